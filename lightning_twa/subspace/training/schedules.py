"""The learning rate over the steps of the phase, as a share of its peak."""

from __future__ import annotations

import math

from lightning_twa.config import SolverConfig

__all__ = ["peak_within", "schedule_factor", "schedule_sum"]


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
