"""Where weights wait: copies of the weights, in memory or in files."""

from lightning_twa.candidates.candidate import Candidate, persistent_buffers
from lightning_twa.candidates.files import CandidateFileError
from lightning_twa.candidates.store import Store

__all__ = ["Candidate", "CandidateFileError", "Store", "persistent_buffers"]
