"""Bars for what takes long between a Trainer's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["show_progress"]

PATIENCE = 1.0  # seconds before a bar appears


@contextmanager
def show_progress(
    trainer: Trainer, what: str, unit: str, total: int | None
) -> Iterator[Callable[[int], object]]:
    """A bar on rank zero, where the Trainer has one too, for what takes more than a second.

    Args:
        trainer: The Trainer.
        what: What is done, ``"building the subspace"``.
        unit: What is counted.
        total: How many there are, ``None`` when it is not known.

    Yields:
        To be called with the number that has been done since the last call.
    """
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        # Even a disabled bar starts a thread, and takes a lock that forked processes share: one
        # that is killed while it holds it would block the others.
        yield lambda count: None
        return
    with tqdm(
        total=total,
        desc=f"TWA: {what}",
        unit=unit,
        unit_scale=True,
        delay=PATIENCE,
        leave=False,
    ) as bar:
        yield bar.update
