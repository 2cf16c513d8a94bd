"""Where weights wait: copies of the weights, in memory or in files."""

from lightning_twa.candidates.averages import RunningAverages, average_name
from lightning_twa.candidates.candidate import Candidate, further_names, persistent_buffers
from lightning_twa.candidates.files import CandidateFileError
from lightning_twa.candidates.store import Store

__all__ = [
    "Candidate",
    "CandidateFileError",
    "RunningAverages",
    "Store",
    "average_name",
    "further_names",
    "persistent_buffers",
]
