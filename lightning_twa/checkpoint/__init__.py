"""What a checkpoint holds of a run: its keys, the format's version, checks, and reading it."""

from lightning_twa.checkpoint.format import FORMAT_VERSION, RAW_WEIGHTS, check_state
from lightning_twa.checkpoint.read import (
    candidate_entries,
    file_references,
    read_state,
    warn_of_averages,
)
from lightning_twa.checkpoint.running import power_averages_of

__all__ = [
    "FORMAT_VERSION",
    "RAW_WEIGHTS",
    "candidate_entries",
    "check_state",
    "file_references",
    "power_averages_of",
    "read_state",
    "warn_of_averages",
]
