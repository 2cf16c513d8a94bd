"""What held-out data decide: from which average the phase starts, and which point of its path the
run ends with. Pure functions of names and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_twa.candidates import decay_curve, is_running

__all__ = ["LAST", "POINTS", "Comparison", "fixed_averages", "points_of_path"]

LAST = "last weights"
POINTS = 8  # of the path
WINDOWS = (2, 4, 8)  # newest snapshots
# What one takes who knows nothing; see docs/contributing/defaults.md
USUAL = ("power(0.13)", "uniform")
SINGLE = 16  # candidates of a soup, of which each is compared too


def fixed_averages(
    names: Sequence[str], given: Sequence[str], *, soup: bool, dense: bool = False
) -> dict[str, Tensor]:
    """The averages with weights that are fixed beforehand, of which the best may be the start.

    Args:
        names: Of the candidates, oldest first.
        given: Those of them that are no snapshots of this run: running averages and files.
        soup: Whether all are from files.
        dense: Whether snapshots are means over steps: none of them is the last weights.

    Returns:
        ``(n,)`` float64 averaging weights by what a reader calls the average.
    """
    n = len(names)
    own = [i for i, name in enumerate(names) if name not in given]
    averages = [i for i, name in enumerate(names) if name in given and is_running(name)]
    files = [i for i in range(n) if i not in own and i not in averages]
    if soup:
        result = {"uniform": _uniform(range(n), n)}
        singles = {names[i]: _uniform([i], n) for i in range(n)}
        return {**result, **(singles if n <= SINGLE else {})}
    # the last weights are beside the snapshots where these do not end with them
    snapshots = [i for i in own if not (i == own[-1] and _is_extra(names, own))]
    has_last = bool(own) and not (dense and own == snapshots)
    result = {LAST: _uniform(own[-1:], n)} if has_last else {}
    if len(snapshots) + len(files) > 1:
        result["uniform"] = _uniform([*files, *snapshots], n)
    for k in WINDOWS:
        if k < len(snapshots):
            result[f"last {k}"] = _uniform(snapshots[-k:], n)
    if len(snapshots) > 2:
        curve = torch.zeros(n, dtype=torch.float64, device="cpu")
        shares = decay_curve(len(snapshots))
        curve[snapshots] = torch.tensor(shares, dtype=torch.float64, device="cpu")
        result["1-sqrt curve"] = curve
    result.update({names[i]: _uniform([i], n) for i in averages})
    return result


def _is_extra(names: Sequence[str], own: Sequence[int]) -> bool:
    """Whether the newest is named by its step, and the others by their epochs; or by name."""
    kinds = {names[i].partition("=")[0] for i in own[:-1]}
    newest = names[own[-1]]
    return newest.startswith("last(") or (newest.startswith("step=") and kinds != {"step"})


def _uniform(members: Sequence[int] | range, n: int) -> Tensor:
    weights = torch.zeros(n, dtype=torch.float64, device="cpu")
    weights[list(members)] = 1 / len(members)
    return weights


def points_of_path(steps: int | None) -> list[int]:
    """After how many steps of the phase its weights are compared; its end is, in any case.

    Args:
        steps: Of the phase; ``None`` where that is not known.
    """
    if steps is None:
        return []
    return sorted({max(round(steps * i / POINTS), 1) for i in range(1, POINTS + 1)})


class Comparison:
    """Losses on the same held-out batches, of averages and of points of the path, and what follows
    from them.

    Attributes:
        fixed: ``(m,)`` losses of each fixed average.
        path: The same of each point, by its optimizer step of the phase.
        best: What the phase goes back to if its best point is not its last: that point.
    """

    def __init__(self) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.path: dict[int, Tensor] = {}
        self.best: dict[str, Any] = {}

    @property
    def start(self) -> str:
        """The best fixed average, or the usual one, where that is not clearly worse. One batch
        alone does not tell them apart.
        """
        best = min(self.fixed, key=lambda name: _mean(self.fixed[name]))
        usual = next((name for name in USUAL if name in self.fixed), best)
        if usual == USUAL[0] and self._one_batch and math.isfinite(_mean(self.fixed[usual])):
            return usual
        return best if _is_better(self.fixed[best], self.fixed[usual]) else usual

    @property
    def _one_batch(self) -> bool:
        return all(len(losses) == 1 for losses in self.fixed.values())

    @property
    def chosen(self) -> tuple[str, str]:
        """The start, and what held-out data say of it, in words."""
        start = self.start
        if _mean(self.fixed[start]) <= min(_mean(losses) for losses in self.fixed.values()):
            return start, "the best"
        if self._one_batch:
            return start, "another was better, but one batch does not tell"
        return start, "none was better by more than the standard error"

    @property
    def accepted(self) -> int | None:
        """The step of the best point of the path; ``None`` where it is not clearly better than the
        start.
        """
        if not self.path:
            return None
        step = min(self.path, key=lambda s: _mean(self.path[s]))
        return step if _is_better(self.path[step], self.fixed[self.start]) else None

    def gain_of(self, step: int) -> tuple[float, float]:
        """By how much a point is better than the start, the mean over batches, and its standard
        error.
        """
        return _paired(self.fixed[self.start] - self.path[step])

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with."""
        return {
            "fixed": dict(self.fixed),
            "path": [{"step": step, "losses": losses} for step, losses in self.path.items()],
            "best": dict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.fixed = dict(state["fixed"])
        self.path = {point["step"]: point["losses"] for point in state["path"]}
        self.best = dict(state["best"])


def _paired(differences: Tensor) -> tuple[float, float]:
    """Their mean and its standard error; that is no number with one alone."""
    m = len(differences)
    error = float(differences.std()) / math.sqrt(m) if m > 1 else math.nan
    return float(differences.mean()), error


def _is_better(losses: Tensor, others: Tensor) -> bool:
    """Whether they are lower by more than the standard error of the difference. A few batches do
    not tell that well: it counts more, then. One alone does not tell it at all.
    """
    gain, error = _paired(others - losses)
    m = len(losses)
    if not math.isfinite(gain):
        return _mean(losses) < _mean(others)
    return gain > 0 and (m == 1 or gain > error * m / (m - 1))


def _mean(losses: Tensor) -> float:
    """Where it is no number, worse than anything."""
    value = float(losses.mean())
    return value if math.isfinite(value) else math.inf
