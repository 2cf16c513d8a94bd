"""Groups of candidates that are optimized one after another, where all of them do not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CandidateGroups"]


class CandidateGroups:
    """Which candidates span the subspace when, and what each group arrived at.

    Each group starts from the weights that the one before it arrived at, the first from the uniform
    average of all candidates; the result is the mean of what they arrived at (the "model batches"
    of the code of arXiv 2205.13104). Groups are interleaved, so that each covers the whole window.

    Args:
        n: Number of candidates.
        num_blocks: ``B``.
        size: Candidates in a group, at most.
        total_steps: Optimizer steps of the whole phase.

    Attributes:
        current: Index of the group that is optimized now.
        start: ``(n, B)`` float64, the averaging weights that it starts from.
        results: ``(n, B)`` each, what the groups before it arrived at.
    """

    def __init__(self, n: int, num_blocks: int, size: int, total_steps: int) -> None:
        self.n, self.total_steps = n, total_steps
        self.count = math.ceil(n / size)
        self.current = 0
        self.start = torch.full((n, num_blocks), 1 / n, dtype=torch.float64, device="cpu")
        self.results: list[Tensor] = []
        # start and members on each device that has asked for weights
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def members(self) -> list[int]:
        """The candidates of the current group; two at least."""
        chosen = list(range(self.current, self.n, self.count))
        return chosen if len(chosen) > 1 else [*chosen, 0]

    @property
    def steps(self) -> int:
        """Optimizer steps of the current group; one at least, so that of more groups than steps the
        last have none.
        """
        before, after = (
            self.total_steps * g // self.count for g in (self.current, self.current + 1)
        )
        return max(after - before, 1)

    @property
    def last(self) -> bool:
        """Whether no group follows."""
        return self.current + 1 == self.count

    def weights(self, moved: Tensor) -> Tensor:
        """``(n, B)`` the averaging weights of all candidates.

        Args:
            moved: ``(m, B)``, by how much those of the current group's members have changed.
        """
        if moved.device not in self._placed:
            members = torch.tensor(self.members, device=moved.device)
            self._placed[moved.device] = self.start.to(moved), members
        start, members = self._placed[moved.device]
        return start.index_add(0, members, moved)

    def result(self, moved: Tensor) -> Tensor:
        """``(n, B)`` the mean of what the groups arrived at, the current one included."""
        return torch.stack([*self.results, self.weights(moved)]).mean(dim=0)

    def following(self, moved: Tensor) -> CandidateGroups:
        """The groups as they are when the next one begins."""
        following = copy.copy(self)
        following._placed = {}
        following.start = self.weights(moved)
        following.results = [*self.results, following.start]
        following.current = self.current + 1
        return following

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with."""
        return {"results": list(self.results)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: When it has another shape.
        """
        results = list(state["results"])
        if len(results) >= self.count or any(r.shape != self.start.shape for r in results):
            shapes = [tuple(r.shape) for r in results]
            raise ValueError(
                f"The checkpoint's phase has results of {len(results)} groups of shapes {shapes}, "
                f"but there are {self.count} groups of candidates and blocks "
                f"{tuple(self.start.shape)}. Resume with the same SubspaceConfig."
            )
        self.results, self.current = results, len(results)
        self._placed = {}
        if results:
            self.start = results[-1]
