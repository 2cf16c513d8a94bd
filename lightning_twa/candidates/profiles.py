"""What averages over steps weigh: plain numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from lightning_twa.config import WIDEST
from lightning_twa.machine import say

__all__ = [
    "MEAN",
    "decay_curve",
    "fitted_factors",
    "gamma_of",
    "is_running",
    "power_name",
    "profile",
    "width_of",
]

MEAN = "mean"  # name of the uniform average of all steps
PARTS = 2000  # of a run, in which weights over its steps are compared


def power_name(width: float) -> str:
    """Name of the candidate, ``"power(0.02)"``."""
    return f"power({width:g})"


def is_running(name: str) -> bool:
    """Whether candidates of that name are averages over the steps of a run."""
    return name == MEAN or name.startswith(("power(", "ema("))


def width_of(gamma: float) -> float:
    """``sigma_rel`` of the weights ``s ** gamma``: their standard deviation in time, as a share of
    the run (arXiv 2312.02696, eq. 126).
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(width: float) -> float:
    """The exponent that gives a width in ``(0, 1 / sqrt(12))``; the inverse of :func:`width_of`."""
    low, high = 0.0, 1.0
    while width_of(high) > width:
        high *= 2
    for _ in range(200):  # to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if width_of(middle) > width else (low, middle)
    return (low + high) / 2


def profile(gamma: float, parts: int) -> list[float]:
    """The weight of each of so many equal parts of a run in the average with ``s ** gamma``."""
    ends = [(i / parts) ** (gamma + 1) for i in range(parts + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


def fitted_factors(names: Sequence[str], width: float) -> list[float]:
    """By how much to weigh candidates for an average of another width: the least-squares fit of its
    weights over the steps by those of the power averages among them and of their mean.

    Args:
        names: Of the candidates.
        width: ``sigma_rel`` of the average.

    Returns:
        One number for each candidate, 0 for those that are no power averages; their sum is 1.

    Raises:
        ValueError: When the width is outside its range, or there are fewer than two such averages.
    """
    if not (isinstance(width, float) and 0 < width <= WIDEST):
        raise ValueError(f"Invalid sigma_rel={width!r}. Must be in (0, {WIDEST}].")
    found = {i: 0.0 for i, name in enumerate(names) if name == MEAN}
    for i, name in enumerate(names):
        if name.startswith("power(") and name.endswith(")"):
            found[i] = gamma_of(float(name[len("power(") : -1]))
    if len(found) < 2:
        raise ValueError(
            "average(method='power') needs candidates that are power averages, but there are "
            f"{len(found)}. Give a callback whose run had CollectConfig.power_averages."
        )
    target = torch.tensor(profile(gamma_of(width), PARTS), dtype=torch.float64, device="cpu")
    profiles = [profile(g, PARTS) for g in found.values()]
    held = torch.tensor(profiles, dtype=torch.float64, device="cpu").T
    # The factors sum to 1: the last is 1 minus the others.
    ways = held[:, :-1] - held[:, -1:]
    solved = torch.linalg.lstsq(ways, (target - held[:, -1])[:, None], driver="gelsd").solution[
        :, 0
    ]
    factors = [*solved.tolist(), 1 - float(solved.sum())]
    fit = held @ torch.tensor(factors, dtype=torch.float64, device="cpu")
    error = float((fit - target).norm() / target.norm())
    say(
        f"TWA: the weights over the steps of sigma_rel={width:g} are fitted by {len(found)} "
        f"averages with a relative error of {error:.2g}."
    )
    result = [0.0] * len(names)
    for i, factor in zip(found, factors, strict=True):
        result[i] = factor
    return result


def decay_curve(n: int) -> list[float]:
    """The merge of ``n`` checkpoints in which an update between the ``i``-th and the next counts by
    the mean of ``1 - sqrt(u)`` over its part of ``[0, 1]``: a checkpoint has the difference of two
    such means (arXiv 2507.17634).
    """

    def mean(i: int) -> float:
        low, high = i / (n - 1), (i + 1) / (n - 1)
        area: float = 2 / 3 * (high**1.5 - low**1.5)
        return 1 - area / (high - low)

    shares = [1.0, *(mean(i) for i in range(n - 1)), 0.0]
    return [a - b for a, b in itertools.pairwise(shares)]
