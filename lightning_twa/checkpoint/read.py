"""The callback's state in a Lightning checkpoint, without a Trainer.

A checkpoint may come from somebody else: nothing in it is trusted to be of the type or the shape
that this package writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_twa.candidates import Reference, load_checkpoint
from lightning_twa.checkpoint.format import check_state
from lightning_twa.machine import warn

__all__ = ["candidate_entries", "file_references", "read_state", "warn_of_averages"]

# Of the state, whatever the class that wrote it is called
KEYS = {"format_version", "phase", "candidate_names"}


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a run with a ``TWACallback`` left in a checkpoint, with entries that fit together.

    No Python objects are loaded, and no other file is touched.

    Raises:
        ValueError: Naming the file, when it is no checkpoint, holds no state of this callback, or
            one that is damaged.
    """
    damaged = (
        f"{path}: The TWACallback state in the checkpoint is damaged, or another program wrote it: "
        f"its entries do not fit together. Use another checkpoint."
    )
    try:
        state = _read(Path(path))
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # of forged entries
        raise ValueError(damaged) from error
    try:
        list(file_references(state))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(damaged) from error
    return state


def _read(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path, objects=True)
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


def candidate_entries(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The candidates that a checkpoint holds or names, what is frozen in all of them, and running
    averages that are in files.
    """
    if state["phase"] == "done":
        return []
    held = state["candidates"]
    frozen = [] if held["frozen"] is None else [held["frozen"]]
    averages = [a for a in held.get("averages", {}).get("averages", []) if "files" in a]
    return [*held.get("given", []), *held["window"], *frozen, *averages]


def file_references(state: Mapping[str, Any]) -> Iterator[Reference]:
    """The files that a checkpoint's candidates are in."""
    for entry in candidate_entries(state):
        for reference in entry.get("files", []):
            yield Reference.from_state(reference)


def warn_of_averages(paths: Sequence[Path]) -> None:
    """Warn where files of ordinary weights and of finished runs, which hold averages of such, are
    to be averaged together: a pattern often takes both.
    """
    averages = [path for path in paths if len(paths) > 1 and _is_average(path)]
    if 0 < len(averages) < len(paths):
        first = averages[0].name
        more = f" and {len(averages) - 1} more" if len(averages) > 1 else ""
        warn(
            f"{first}{more} of {len(paths)} files hold the average that a run ended with, the "
            f"others ordinary weights: what went into that average counts twice. Name the files "
            f"of one kind."
        )


def _is_average(path: Path) -> bool:
    """Whether a file is the checkpoint of a run whose phase is over."""
    try:
        return path.suffix == ".ckpt" and read_state(path)["phase"] == "done"
    except ValueError:  # of something else
        return False
