"""The user's settings as epochs of a run: when to collect, and when the phase starts."""

from __future__ import annotations

import itertools
from dataclasses import replace

from lightning_twa.config import CollectConfig
from lightning_twa.phases.enough import check_enough_candidates
from lightning_twa.phases.schedule import NEVER, CollectPlan

__all__ = ["cycle_bounds", "newest_of", "resolve_epoch", "resolve_plans"]


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
    if soup and collect.dense:
        raise ValueError(
            f"CollectConfig(dense=True) needs epochs to collect in, but {given}. Pass "
            f"start_epoch >= 1, or leave it out."
        )
    n = collect.every_n_epochs or 1
    if collect.start is None:
        # Halfway, but early enough for two candidates at epoch ends.
        last = (first + start) - (first + start) % n - 1
        collect_start = max(min(first + start // 2, last - n), first)
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
    power = 0 if soup else len(collect.power_averages)
    averages = len(collect.ema_decays) + (power + 2 if power else 0)  # the mean, the last weights
    check_enough_candidates(plan, expected, files + averages)
    return plan


def newest_of(plan: CollectPlan, most: int | None) -> CollectPlan | None:
    """The plan with a window of the newest: as many as there would have been, or as are kept at
    most; ``None`` where that is not known.

    Args:
        plan: The schedule.
        most: How many candidates it would give; ``None`` where that is not known.
    """
    limit = plan.max_candidates
    if most is not None and (limit is None or plan.evenly):
        limit = min(max(most, 2), limit or most + 2)
    return None if limit is None else replace(plan, max_candidates=limit, evenly=False)


def _from_the_start(plan: CollectPlan) -> CollectPlan:
    """Collecting from epoch 0 on, with a window of as many candidates. By steps, how many that are
    is not known without a limit.
    """
    most = plan.count_ahead(plan.collect_start, 0, None)
    limit = newest_of(plan, most)
    return plan if limit is None else replace(limit, collect_start=0)


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
        uniform=True,
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
