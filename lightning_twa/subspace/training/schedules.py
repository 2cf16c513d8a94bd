"""The learning rate over the steps of the phase, as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_twa.config import SolverConfig

__all__ = ["first_peak", "peak_within", "resumed_peak", "schedule_factor", "schedule_sum"]


def schedule_factor(config: SolverConfig, step: int, total_steps: int | None) -> float:
    """Learning rate of an optimizer step as a share of the peak.

    Args:
        config: Schedule and warm-up.
        step: 0-based optimizer step of the phase.
        total_steps: Optimizer steps of the whole phase; ``None`` if unknown (constant schedule
            only).

    Returns:
        A factor in [0, 1]; 0 past the end of a schedule that ends at zero.
    """
    if total_steps is None:
        return 1.0
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return 1 - progress
    overall = step / total_steps
    return 1.0 if overall < 0.5 else 0.1 if overall < 0.75 else 0.01


def schedule_sum(config: SolverConfig, total_steps: int, first: int = 0) -> float:
    """The sum of the factors of the steps from ``first`` on: the length of their path in units of
    the peak learning rate.
    """
    return sum(schedule_factor(config, step, total_steps) for step in range(first, total_steps))


def peak_within(config: SolverConfig, budget: float, first: int, total_steps: int) -> float:
    """The peak learning rate with which the path of the steps from ``first`` on is as long as a
    budget; infinite where there is none to go.
    """
    left = schedule_sum(config, total_steps, first)
    return max(budget, 0.0) / left if left > 0 else math.inf


def first_peak(config: SolverConfig, radius: float, total_steps: int | None) -> float:
    """The peak learning rate of a phase that begins."""
    if config.lr is not None:
        return float(config.lr)
    assert total_steps is not None
    return peak_within(config, radius, 0, total_steps)


def resumed_peak(
    config: SolverConfig,
    peak: float,
    left: float,
    position: int,
    total_steps: int,
    state: Mapping[str, Any],
) -> float:
    """The peak learning rate of a phase that goes on.

    Args:
        config: Schedule and warm-up.
        peak: Of a phase of this length that begins.
        left: Of the radius.
        position: Next step of the schedule.
        total_steps: Optimizer steps of the whole phase.
        state: Of the optimizer, when it was saved.
    """
    if state.get("total_steps", total_steps) == total_steps:
        return float(state.get("peak_lr", peak))
    if config.lr is not None:
        return peak
    return min(peak, peak_within(config, left, position, total_steps))
