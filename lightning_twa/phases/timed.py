"""The length of a run that time limits: estimated from the steps so far, again and again."""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer

from lightning_twa.machine import from_rank_zero
from lightning_twa.trainer import seconds_taken_and_left

__all__ = ["TimedLength"]

FIRST = 4  # optimizer steps that are not counted (they are slow), and that the first estimate is by


class TimedLength:
    """The optimizer steps that a run will have had when its time is over, the same on all ranks.

    They are estimated by the steps per second since the first few of this fit: when the steps have
    doubled or half of those left are over, whichever comes first, some twenty times in a run of a
    million steps; and once more where the phase is due by that, which cannot be taken back.

    Attributes:
        steps: The newest estimate; ``None`` where there is none, or no limit.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self._next = 0
        self._since: tuple[int, float] | None = None  # steps, and seconds taken then

    def is_due(self, trainer: Trainer, start_step: int | None) -> bool:
        """Whether :meth:`look` has something to do.

        Args:
            trainer: The Trainer.
            start_step: At which the phase begins, as it looks now.
        """
        now = trainer.global_step
        begins = self.steps is not None and start_step is not None and now >= start_step
        return begins or now >= self._next

    def look(self, trainer: Trainer, start_step: int | None) -> None:
        """Estimate anew where that is due; every rank calls it at the same steps.

        Args:
            trainer: The Trainer.
            start_step: At which the phase begins, as it looks now.
        """
        if not self.is_due(trainer, start_step):
            return
        times, now = seconds_taken_and_left(trainer), trainer.global_step
        first, self._next = self._next == 0, now + FIRST
        if times is None:
            self._next = sys.maxsize  # of this fit
        if times is None or first:
            return
        shared = from_rank_zero(torch.tensor(times), trainer.strategy.root_device)
        taken, left = shared.tolist()
        if self._since is None:
            self._since = now, taken
            return
        before, taken_then = self._since
        seconds = max(taken - taken_then, 1e-9)
        ahead = int(min(max(left, 0.0) * (now - before) / seconds, 1e15))
        self.steps = now + ahead
        self._next = now + max(min(ahead // 2, now), 1)
