"""When to collect and when the phase starts: pure functions of epoch and optimizer step."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Any

from lightning_twa.config import CollectConfig

NEVER = sys.maxsize  # an epoch that does not come

__all__ = ["CollectPlan", "cycle_bounds", "resolve_epoch", "resolve_plans"]


def resolve_epoch(name: str, value: int | float, max_epochs: int | None) -> int:
    """The 0-based epoch that ``value`` means.

    Args:
        name: Name of the setting, for the error.
        value: An epoch, or a fraction of ``max_epochs``.
        max_epochs: Number of epochs of the run; ``None`` when the run has no limit in epochs.

    Raises:
        ValueError: When a fraction is given and the run has no limit in epochs.
    """
    if isinstance(value, int):
        return value
    if max_epochs is None:
        raise ValueError(
            f"{name}={value} is a fraction of the run, but this Trainer has no limit "
            f"(max_epochs=-1, max_steps=-1). Pass {name} as an int, or set "
            f"Trainer(max_epochs=...) or max_steps."
        )
    # 0.7 * 10 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996: round off the float noise.
    return int(round(value * max_epochs, 6))


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
        first: The epoch that the part of the run begins with.
        start_step: Optimizer step at which the phase begins, where it does not begin with an epoch:
            ``start_epoch`` is then the epoch that it falls into.
        collect_start_step: First optimizer step that gives candidates.
        phase_steps: Optimizer steps of the phase, where they are known.
    """

    collect_start: int
    start_epoch: int
    end: int | None
    every_n_epochs: int
    every_n_train_steps: int | None
    max_candidates: int | None
    first: int = 0
    start_step: int | None = None
    collect_start_step: int | None = None
    phase_steps: int | None = None

    @classmethod
    def of(cls, collect: CollectConfig, **when: Any) -> CollectPlan:
        """A schedule with the intervals of a configuration, and the other arguments."""
        return cls(
            every_n_epochs=collect.every_n_epochs,
            every_n_train_steps=collect.every_n_train_steps,
            max_candidates=collect.max_candidates,
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
            and not early
            and self.collect_start <= epoch < self.start_epoch
            and (epoch + 1) % self.every_n_epochs == 0
        )

    def has_named(self, name: str) -> bool:
        """Whether a candidate of this name, ``"epoch=3"`` or ``"step=40"``, is from the window."""
        kind, _, number = name.partition("=")
        if not number.isdecimal():
            return True
        if kind == "epoch":
            return int(number) >= self.collect_start
        return int(number) >= (self.collect_start_step or 0)

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
        if self.every_n_train_steps is None:
            how = (
                "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
            )
        else:
            how = f"every {self.every_n_train_steps} optimizer steps"
        if self.collect_start_step is not None:
            end = "" if self.start_step is None else f" to {self.start_step}"
            return f"{how} from optimizer step {self.collect_start_step}{end}"
        return f"{how} of epochs {self.collect_start} to {self.start_epoch - 1}"


def resolve_plans(
    start_epoch: int | float,
    collect: CollectConfig,
    max_epochs: int | None,
    files: int = 0,
    uniform: bool = False,
    cycles: int = 1,
    on_early_stopping: bool = False,
    max_steps: int = -1,
) -> list[CollectPlan]:
    """Turn the user's settings into epochs of this run, one plan for each cycle.

    Args:
        start_epoch: First epoch of the phase, counted from the start of a cycle, or a fraction of
            the cycle.
        collect: When candidates are kept.
        max_epochs: Number of epochs of the run; ``None`` when it has no limit in epochs.
        files: Number of candidates from files.
        uniform: Collect to the end of a cycle, without a phase.
        cycles: Parts of equal length that the run is divided into.
        on_early_stopping: Whether the phase may begin earlier: collecting begins with the run, and
            keeps as many of the newest candidates as there would have been.
        max_steps: Optimizer steps of the run, of which ``CollectConfig.start`` is a fraction where
            there is no limit in epochs; -1 without a limit.

    Raises:
        ValueError: When the phase would never start, or the window cannot hold two candidates.
    """
    if cycles == 1:
        share = collect.start if max_epochs is None and max_steps != -1 else None
        by_steps = isinstance(share, float) and not uniform
        epochs = replace(collect, start=0) if by_steps else collect
        plan = _resolve(start_epoch, epochs, 0, max_epochs, files, uniform)
        if by_steps and share is not None:
            return [replace(plan, collect_start_step=int(round(share * max_steps, 6)))]
        return [_from_the_start(plan) if on_early_stopping and collect.start is None else plan]
    try:
        return [
            _resolve(start_epoch, collect, a, b, files, uniform)
            for a, b in cycle_bounds(cycles, max_epochs)
        ]
    except ValueError as error:
        if max_epochs is None:
            raise
        raise ValueError(
            f"cycles={cycles} gives cycles of {max_epochs // cycles} epochs, within which "
            f"start_epoch and CollectConfig.start count. {error}"
        ) from None


def cycle_bounds(cycles: int, max_epochs: int | None) -> list[tuple[int, int | None]]:
    """The first epoch of each part of a run, and the one behind its last.

    Raises:
        ValueError: When there are several of a run without a limit in epochs.
    """
    if cycles == 1:
        return [(0, max_epochs)]
    if max_epochs is None:
        raise ValueError(
            f"cycles={cycles} divides the run's epochs, but this Trainer has no limit in epochs "
            f"(max_epochs=-1, or max_steps alone). Set Trainer(max_epochs=...)."
        )
    bounds = [max_epochs * i // cycles for i in range(cycles + 1)]
    return list(itertools.pairwise(bounds))


def _resolve(
    start_epoch: int | float,
    collect: CollectConfig,
    first: int,
    end: int | None,
    files: int,
    uniform: bool,
) -> CollectPlan:
    """The plan of the cycle of epochs ``first`` to ``end - 1``."""
    if uniform:
        return _plan_to_the_end(start_epoch, collect, first, end)
    length = None if end is None else end - first
    start = resolve_epoch("start_epoch", start_epoch, length)
    given = f"start_epoch={start_epoch}" + (f" (epoch {start})" if start != start_epoch else "")
    if length is not None and start >= length:
        raise ValueError(
            f"{given} must be below max_epochs={length}: the phase trains the averaging "
            f"coefficients in the epochs from start_epoch on. Lower start_epoch or raise "
            f"max_epochs."
        )
    soup = start == 0 and collect.checkpoints is not None
    if start < 1 and not soup:
        raise ValueError(
            f"{given} leaves no epoch to collect candidates in. Pass start_epoch >= 2 (1 with "
            f"CollectConfig.every_n_train_steps), or CollectConfig.checkpoints for a soup."
        )
    if soup and collect.ema_decays:
        raise ValueError(
            f"CollectConfig.ema_decays={collect.ema_decays} needs epochs to collect in, but "
            f"{given}. Pass start_epoch >= 1, or no ema_decays."
        )
    if collect.start is None:
        # Halfway, but early enough for two candidates at epoch ends.
        last = (first + start) - (first + start) % collect.every_n_epochs - 1
        collect_start = max(min(first + start // 2, last - collect.every_n_epochs), first)
    else:
        collect_start = first + resolve_epoch("CollectConfig.start", collect.start, length)
    plan = CollectPlan.of(
        collect,
        collect_start=collect_start,
        start_epoch=first + start,
        end=end,
        first=first,
    )
    if collect_start >= first + start and not (soup and collect.start is None):
        raise ValueError(
            f"CollectConfig.start={collect.start} (epoch {collect_start - first}) must be below "
            f"{given}: candidates are kept before the phase starts."
        )
    expected = plan.count_ahead(first, 0, None)
    check_enough_candidates(plan, expected, files + len(collect.ema_decays))
    return plan


def _from_the_start(plan: CollectPlan) -> CollectPlan:
    """Collecting from epoch 0 on, with a window of as many candidates. By steps, how many that are
    is not known without a limit.
    """
    most = plan.count_ahead(plan.collect_start, 0, None)
    limit = plan.max_candidates
    if limit is None and most is None:
        return plan
    if limit is None and most is not None:
        limit = max(most, 2)
    return replace(plan, collect_start=0, max_candidates=limit)


def _plan_to_the_end(
    start_epoch: int | float, collect: CollectConfig, first: int, end: int | None
) -> CollectPlan:
    """Collecting without a phase after it, from ``CollectConfig.start`` or ``start_epoch`` on."""
    name, value = "CollectConfig.start", collect.start
    if value is None:
        name, value = "start_epoch", start_epoch
    length = None if end is None else end - first
    collect_start = first + resolve_epoch(name, value, length)
    plan = CollectPlan.of(
        collect,
        collect_start=collect_start,
        start_epoch=NEVER if end is None else end,
        end=end,
        first=first,
    )
    some = end is None or any(plan.takes_epoch_end(epoch) for epoch in range(collect_start, end))
    by_steps = collect.every_n_train_steps is not None
    if collect_start >= plan.start_epoch or not (some or by_steps or collect.ema_decays):
        raise ValueError(
            f"There will be nothing to average: {name}={value} (epoch {collect_start - first}), "
            f"every_n_epochs={collect.every_n_epochs} and max_epochs={length} give no "
            f"candidate. Lower {name}, or every_n_epochs."
        )
    return plan


def check_something(plan: CollectPlan, expected: int | None, averages: int) -> None:
    """Without a phase, one candidate is enough.

    Args:
        plan: The schedule, for the message.
        expected: Number of snapshots there will be; ``None`` when it cannot be known.
        averages: Number of running averages.

    Raises:
        ValueError: When there will be none.
    """
    if expected == 0 and averages == 0:
        raise ValueError(
            f"There will be nothing to average: collecting {plan.describe()} gives no candidate. "
            f"Start collecting earlier (CollectConfig.start), or collect more often "
            f"(every_n_epochs, every_n_train_steps)."
        )


def check_enough_candidates(
    plan: CollectPlan, expected: int | None, others: int = 0, mask_size: int | None = None
) -> None:
    """Two points span the smallest subspace; a mask leaves at least one candidate out.

    Args:
        plan: The schedule, for the message.
        expected: Number of snapshots there will be; ``None`` when it cannot be known.
        others: Number of running averages and files.
        mask_size: Candidates that a mask keeps.

    Raises:
        ValueError: When too few candidates are to be expected.
    """
    limit = plan.max_candidates
    if expected is not None and limit is not None:
        expected = min(expected, limit)
    most = limit if expected is None else expected
    if mask_size is not None and most is not None and most + others <= mask_size:
        raise ValueError(
            f"SubspaceConfig.mask_size={mask_size} needs more than {mask_size} candidates, but "
            f"there will be {most + others}. Lower mask_size, or have more candidates."
        )
    if expected is None or expected + others >= 2:
        return
    if plan.start_epoch == 0 and plan.start_step is None:
        raise ValueError(
            f"TWA needs at least two candidates, but CollectConfig.checkpoints names {others} "
            f"file(s), and start_epoch=0 leaves no epoch to collect in. Name more files."
        )
    also = f", and there are {others} from files and running averages" if others else ""
    later = "raise start_epoch" if plan.start_step is None else "begin the phase later"
    raise ValueError(
        f"TWA needs at least two candidates, but collecting {plan.describe()} gives {expected} "
        f"before {plan.describe_start()}{also}. Start collecting earlier (CollectConfig.start), "
        f"collect more often (every_n_epochs, every_n_train_steps), or {later}."
    )
