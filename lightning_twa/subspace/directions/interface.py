"""What directions do, however they are kept, and how they measure what keeping them loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_twa.subspace.directions.scratch import Scratch

__all__ = ["Directions", "relative", "squared_error"]


class Directions(Protocol):
    """``k`` directions of ``D`` columns."""

    num_directions: int
    error: float
    """Relative error of what is stored, ``||u - stored|| / ||u||``, of all columns; without the
    rounding of the products that directions are mixed by."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def path(self) -> str:
        """How the products are computed, in a word."""

    def write(self, tile: int, values: Tensor, scratch: Scratch) -> Tensor:
        """Take a tile of the padded vector; several threads may write a tile each.

        Args:
            tile: Its index.
            values: ``(k, columns)`` float32 or float64 on the CPU, from its first column to the end
                of the group with its last one that is no padding. They are overwritten.
            scratch: Memory of this thread.

        Returns:
            ``(2,)`` float64 on the CPU: squares of what storing loses, and of the values.
        """

    def pieces(self, tiles: slice) -> list[Tensor]:
        """What :meth:`write` has written of tiles: contiguous views, to be filled by what another
        process has written; before :meth:`close`.
        """

    def close(self, squares: Tensor) -> None:
        """All columns are written.

        Args:
            squares: Sums of what :meth:`write` has returned, of all processes that share them.
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


def squared_error(stored: Tensor, exact: Tensor) -> Tensor:
    """What :meth:`Directions.write` returns.

    Args:
        stored: ``(k, columns)`` float32 or float64; overwritten by the error.
        exact: The same in full.
    """
    norms = [torch.linalg.vector_norm(t, dim=-1).double() for t in (stored.sub_(exact), exact)]
    return torch.stack([norm.square().sum() for norm in norms])


def relative(squares: Tensor) -> float:
    """Norm of the error over norm of the exact values; 0 where these are zero."""
    error, norm = squares.tolist()
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
