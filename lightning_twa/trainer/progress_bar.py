"""Bars for what takes long between a Trainer's batches, of the kind that the Trainer shows."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_twa.trainer.features import is_a

__all__ = ["show_progress"]

PATIENCE = 1.0  # seconds before a bar appears
REDRAWN = 0.1  # seconds between two drawings
OURS = "lightning_twa"  # a field of lines that are not the Trainer's

Tick = Callable[[int], object]


@contextmanager
def show_progress(trainer: Trainer, what: str, unit: str, total: int | None) -> Iterator[Tick]:
    """A bar on rank zero, where the Trainer has one too, for what takes more than a second.

    Args:
        trainer: The Trainer.
        what: What is done, ``"building the subspace"``.
        unit: What is counted.
        total: How many there are, ``None`` when it is not known.

    Yields:
        To be called with the number that has been done since the last call.
    """
    own: Any = trainer.progress_bar_callback
    if not trainer.is_global_zero or own is None or getattr(own, "is_disabled", False):
        # Even a disabled bar starts a thread, and takes a lock that forked processes share: one
        # that is killed while it holds it would block the others.
        yield lambda count: None
    elif is_a(own, "RichProgressBar"):
        with _rich_task(own, f"TWA: {what}", total) as tick:
            yield tick
    else:
        with _tqdm_bar(own, f"TWA: {what}", unit, total) as tick:
            yield tick


@contextmanager
def _rich_task(own: Any, what: str, total: int | None) -> Iterator[Tick]:
    """A line among those of the Trainer's bar. It is hidden afterwards and used again, not removed:
    Lightning takes the number of a line for its place among all.
    """
    began = drawn = time.monotonic()
    done, task = 0, None

    def tick(count: int) -> None:
        nonlocal done, drawn, task
        done, now = done + count, time.monotonic()
        bars = own.progress
        if now - began < PATIENCE or bars is None:
            return
        if task is None:
            task = _line_of(bars, what, math.inf if total is None else total)
        elif now - drawn < REDRAWN:
            return
        bars.update(task, completed=done)
        bars.refresh()
        drawn = now

    try:
        yield tick
    finally:
        bars = own.progress
        if task is not None and bars is not None and task in bars.task_ids:  # they may be others
            bars.update(task, visible=False)
            bars.refresh()


def _line_of(bars: Any, what: str, total: float) -> Any:
    """A new line, or one that is hidden."""
    for task in bars.tasks:
        if task.fields.get(OURS) and not task.visible:
            bars.reset(task.id, description=what, total=total, visible=True)
            return task.id
    return bars.add_task(what, total=total, **{OURS: True})


@contextmanager
def _tqdm_bar(own: Any, what: str, unit: str, total: int | None) -> Iterator[Tick]:
    """A bar as the Trainer makes its own, below it; also beside one of the user's own making."""
    with _kind_of(own)(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        delay=PATIENCE,
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout,
    ) as bar:
        yield bar.update


def _kind_of(own: Any) -> Any:
    """The class of the Trainer's bars: in a notebook that has widgets, widgets."""
    for cls in type(own).__mro__:
        if cls.__name__ == "TQDMProgressBar":
            return getattr(sys.modules[cls.__module__], "Tqdm", tqdm)
    return tqdm
