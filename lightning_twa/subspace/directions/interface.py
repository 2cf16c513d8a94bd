"""What directions do, however they are kept, and how they measure what keeping them loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Directions", "SquaredErrors", "Total"]

Total = Callable[[Tensor], Tensor]
"""The sum of a float64 tensor on the CPU over the processes that share the columns."""


class Directions(Protocol):
    """``k`` directions of ``D`` columns."""

    num_directions: int
    error: float
    """Relative error of what is stored, ``||u - stored|| / ||u||``, of all columns."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def path(self) -> str:
        """How the products are computed, in a word."""

    def write(self, columns: slice, values: Tensor) -> None:
        """Take the next columns, in order.

        Args:
            columns: Of the flat vector, inside one tensor.
            values: ``(k, columns)`` float64 on the CPU.
        """

    def close(self, total: Total = ...) -> None:
        """All columns are written.

        Args:
            total: See :data:`Total`.
        """

    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """Compile what is to be compiled, where that works in every process that shares the
        subspace: the same sums in another order would give them other weights.

        Args:
            agree: Whether its argument is true in every process; all of them call it.
        """

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """``(k, B)`` float64 where the device has it; see :meth:`Subspace.project`."""

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""

    def dense(self) -> Tensor:
        """``(k, D)`` what is stored, in the layout's dtype; for inspection."""


class SquaredErrors:
    """Of columns as they are stored, summed up while they are written."""

    def __init__(self) -> None:
        # of errors, and of exact values
        self._sums = torch.zeros(2, dtype=torch.float64, device="cpu")

    def add(self, stored: Tensor, exact: Tensor) -> None:
        """Count some columns, ``(k, columns)``."""
        self._sums[0] += (stored.double() - exact).square().sum()
        self._sums[1] += exact.square().sum()

    def relative(self, total: Total) -> float:
        """Norm of the error over norm of the exact values; 0 where these are zero."""
        error, norm = total(self._sums).tolist()
        return float((error / norm) ** 0.5) if norm > 0 else 0.0
