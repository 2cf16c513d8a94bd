"""When to collect and when the phase starts: pure functions of epoch and optimizer step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from lightning_twa.config import CollectConfig

__all__ = ["NEVER", "CollectPlan"]

MOST = 16  # candidates, beyond which more add little; see docs/benchmarks.md
NEVER = sys.maxsize  # an epoch that does not come


@dataclass(frozen=True, kw_only=True)
class CollectPlan:
    """The resolved schedule. Epochs are 0-based; steps count optimizer steps taken.

    Args:
        collect_start: First epoch that gives candidates.
        start_epoch: First epoch of the phase; no candidate is taken from here on.
        end: The epoch that ends the phase; ``None`` where the run has no limit in epochs.
        every_n_epochs: See :class:`~lightning_twa.CollectConfig`.
        every_n_train_steps: See :class:`~lightning_twa.CollectConfig`.
        max_candidates: See :class:`~lightning_twa.CollectConfig`.
        evenly: Whether those are spread evenly, and not the newest.
        first: The epoch that the part of the run begins with.
        start_step: Optimizer step at which the phase begins, where it does not begin with an epoch:
            ``start_epoch`` is then the epoch that it falls into.
        collect_start_step: First optimizer step that gives candidates.
        phase_steps: Optimizer steps of the phase, where they are known.
    """

    collect_start: int
    start_epoch: int
    end: int | None
    every_n_epochs: int | None
    every_n_train_steps: int | None
    max_candidates: int | None
    evenly: bool = False
    first: int = 0
    start_step: int | None = None
    collect_start_step: int | None = None
    phase_steps: int | None = None

    @classmethod
    def of(cls, collect: CollectConfig, *, uniform: bool = False, **when: Any) -> CollectPlan:
        """A schedule with the intervals of a configuration, and the other arguments.

        Args:
            collect: The configuration.
            uniform: Whether there is no phase.
            when: The other arguments.
        """
        limit, evenly = collect.max_candidates, collect.keep == "evenly"
        if limit == "auto":
            limit, evenly = (None if uniform else MOST), True
        return cls(
            every_n_epochs=collect.every_n_epochs,
            every_n_train_steps=collect.every_n_train_steps,
            max_candidates=limit,
            evenly=evenly,
            **when,
        )

    def covers(self, epoch: int, steps_taken: int) -> bool:
        """Whether weights after ``steps_taken`` optimizer steps, in ``epoch``, are collected."""
        if self.start_step is None:
            before_phase = epoch < self.start_epoch
        else:
            before_phase = steps_taken <= self.start_step
        begun = self.collect_start_step is None or steps_taken >= self.collect_start_step
        return before_phase and begun and epoch >= self.collect_start

    def takes_epoch_end(self, epoch: int, steps_taken: int | None = None) -> bool:
        """Whether the weights at the end of ``epoch`` become a candidate.

        Args:
            epoch: That ends.
            steps_taken: Optimizer steps of the run; ``None`` where only epochs count.
        """
        first = self.collect_start_step
        early = steps_taken is not None and first is not None and steps_taken < first
        return (
            self.every_n_train_steps is None
            and self.every_n_epochs is not None
            and not early
            and self.collect_start <= epoch < self.start_epoch
            and (epoch + 1) % self.every_n_epochs == 0
        )

    def has_named(self, name: str, per_epoch: int | None = None) -> bool:
        """Whether a candidate of this name, ``"epoch=3"`` or ``"step=40"``, is from the window.

        Args:
            name: Of a candidate.
            per_epoch: Optimizer steps of an epoch; ``None`` where they are not known.
        """
        kind, _, number = name.partition("=")
        if not number.isdecimal():
            return True
        first_step = self.collect_start_step or 0
        if kind == "epoch":
            late = per_epoch is None or (int(number) + 1) * per_epoch >= first_step
            return late and int(number) >= self.collect_start
        return int(number) >= first_step

    def takes_step(self, epoch: int, steps_taken: int, before: int | None = None) -> bool:
        """Whether the weights after ``steps_taken`` optimizer steps become a candidate.

        Args:
            epoch: That the steps are in.
            steps_taken: Of the run.
            before: How many there were when this was asked last: several optimizers may step in one
                batch. One less if not given.
        """
        return (
            self.every_n_train_steps is not None
            and self.covers(epoch, steps_taken)
            and steps_taken > 0
            and steps_taken // self.every_n_train_steps
            > (steps_taken - 1 if before is None else before) // self.every_n_train_steps
        )

    def count_ahead(self, epoch: int, steps_taken: int, steps_per_epoch: int | None) -> int | None:
        """How many candidates are still to come from the start of ``epoch`` on.

        Args:
            epoch: Epoch that is about to start.
            steps_taken: Optimizer steps taken before it.
            steps_per_epoch: Optimizer steps per epoch, ``None`` when unknown.

        Returns:
            The number of candidates, or ``None`` when it depends on an unknown number of steps or
            epochs.
        """
        if self.every_n_train_steps is None:
            if self.every_n_epochs is None:
                return 0
            if self.start_epoch == NEVER:
                return None
            n, first = self.every_n_epochs, max(epoch, self.collect_start)
            if self.collect_start_step is not None and steps_per_epoch:
                first = max(first, -(-self.collect_start_step // steps_per_epoch) - 1)
            return max(self.start_epoch // n - first // n, 0)
        if self.start_step is not None and self.collect_start_step is not None:
            n = self.every_n_train_steps
            return max(self.start_step // n - max(steps_taken, self.collect_start_step - 1) // n, 0)
        if steps_per_epoch is None or self.start_epoch == NEVER:
            return None
        first = steps_taken + max(self.collect_start - epoch, 0) * steps_per_epoch
        last = steps_taken + max(self.start_epoch - epoch, 0) * steps_per_epoch
        last = last if self.start_step is None else self.start_step
        n = self.every_n_train_steps
        return max(last // n - first // n, 0)

    def describe_start(self) -> str:
        """When the phase begins, in words."""
        if self.start_step is not None:
            return f"optimizer step {self.start_step}"
        if self.start_epoch == NEVER:
            return "the last steps"
        return f"start_epoch={self.start_epoch}"

    def describe(self) -> str:
        """The window in words, for errors and reports."""
        if self.every_n_train_steps is None and self.every_n_epochs is None:
            how = "averages of all steps"
        elif self.every_n_train_steps is None:
            how = (
                "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
            )
        else:
            how = f"every {self.every_n_train_steps} optimizer steps"
        if self.collect_start_step is not None:
            end = "" if self.start_step is None else f" to {self.start_step}"
            return f"{how} from optimizer step {self.collect_start_step}{end}"
        return f"{how} of epochs {self.collect_start} to {self.start_epoch - 1}"
