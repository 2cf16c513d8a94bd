"""The length of a run that time limits: estimated from the steps so far, again and again."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lightning_twa.machine import from_rank_zero
from lightning_twa.trainer import seconds_taken_and_left

__all__ = ["TimedLength"]

FIRST = 4  # optimizer steps before the first estimate


class TimedLength:
    """The optimizer steps that a run will have had when its time is over, the same on all ranks.

    They are estimated by the steps per second so far, at most when the steps have doubled or half
    of those left are over: some twenty times in a run of a million steps.

    Attributes:
        steps: The newest estimate; ``None`` where there is none, or no limit.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self._next = FIRST

    def look(self, trainer: Trainer) -> bool:
        """Estimate anew where that is due; every rank calls it at the same steps.

        Returns:
            Whether it was, of a run that time limits.
        """
        now = trainer.global_step
        if now < self._next:
            return False
        times = seconds_taken_and_left(trainer)
        if times is None:
            self._next = now + FIRST  # another fit of the Trainer may have a Timer
            return False
        shared = from_rank_zero(torch.tensor(times), trainer.strategy.root_device)
        taken, left = shared.tolist()
        ahead = int(max(left, 0.0) * now / taken) if taken > 0.0 else now
        self.steps = now + ahead
        self._next = now + max(min(ahead // 2, now), 1)
        return True
