"""Where weights wait between collecting and the phase."""

from lightning_twa.candidates.memory import Candidate, MemoryStore, persistent_buffers, take

__all__ = ["Candidate", "MemoryStore", "persistent_buffers", "take"]
