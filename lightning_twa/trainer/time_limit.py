"""How much time a run has taken and has left, by ``max_time`` or the user's own ``Timer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Trainer

from lightning_twa.trainer.features import callbacks, is_a

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Timer

__all__ = ["has_time_limit", "seconds_taken_and_left"]


def has_time_limit(trainer: Trainer) -> bool:
    """Whether time ends the run, if nothing else does before."""
    return seconds_taken_and_left(trainer) is not None


def seconds_taken_and_left(trainer: Trainer) -> tuple[float, float] | None:
    """Seconds of training, those before a run was resumed among them, and those left, on this
    process; ``None`` without a limit.
    """
    timers = cast("list[Timer]", [c for c in callbacks(trainer) if is_a(c, "Timer")])
    times = [(timer.time_elapsed(), timer.time_remaining()) for timer in timers]
    limits = [(taken, left) for taken, left in times if left is not None]
    return min(limits, key=lambda limit: limit[1], default=None)
