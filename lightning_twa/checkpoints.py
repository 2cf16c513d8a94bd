"""The callback's state in a Lightning checkpoint, without a Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_twa.candidates.readers import load_checkpoint
from lightning_twa.state import check_state

__all__ = ["read_state"]

# Of the state, whatever the class that wrote it is called
KEYS = {"format_version", "phase", "candidate_names"}


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a run with a ``TWACallback`` left in a checkpoint.

    No Python objects are loaded, and no other file is touched.

    Raises:
        ValueError: Naming the file, when it is no checkpoint, holds no state of this callback, or
            one that is damaged.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    if not isinstance(callbacks, dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no callbacks in it.")
    states = [s for s in callbacks.values() if isinstance(s, dict) and s.keys() >= KEYS]
    if not states:
        raise ValueError(
            f"{path} holds nothing of a TWACallback: the run had none, or it was written before "
            f"the first candidate was kept."
        )
    try:
        check_state(states[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return states[0]
