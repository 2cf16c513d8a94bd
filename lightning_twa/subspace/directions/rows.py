"""Products with dense rows: plain functions of tensors, to be compiled, in which rows of another
dtype are converted and blocks of columns kept apart on the way, in a few operations for all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_twa.subspace.directions.kernels import Compiled
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import widest

__all__ = ["RowProducts", "compiled_rows", "expand_rows", "project_rows"]

COLUMNS = 1 << 13  # that are summed at a time


def project_rows(rows: Tensor, starts: Tensor, stops: Tensor, g: Tensor) -> Tensor:
    """Of stretches of columns each one's part of rows times vector.

    Args:
        rows: ``(k, D)``.
        starts: ``(N,)`` int64, the first column of each stretch.
        stops: ``(N,)`` one past the last, at most :data:`COLUMNS` further.
        g: ``(D,)``, in the dtype to compute in.

    Returns:
        ``(N, k)``.
    """
    columns = starts.unsqueeze(1) + torch.arange(COLUMNS, device=rows.device)
    inside = columns < stops.unsqueeze(1)
    columns = torch.where(inside, columns, starts.unsqueeze(1))
    vector = torch.where(inside, g[columns], 0.0)
    return (rows[:, columns].to(g.dtype) * vector).sum(-1).T


def expand_rows(rows: Tensor, center: Tensor, ends: Tensor, x: Tensor) -> Tensor:
    """Center plus coefficients times rows.

    Args:
        rows: ``(k, D)``.
        center: ``(D,)``, in the dtype to compute in.
        ends: ``(B,)`` int64, one past the last column of each block.
        x: ``(k, B)``, of the center's dtype.

    Returns:
        ``(D,)``.
    """
    columns = torch.arange(center.shape[0], device=rows.device)
    one = ends.shape[0] == 1
    mixed = x if one else x[:, torch.bucketize(columns, ends, right=True, out_int32=True)]
    return center + (mixed * rows.to(center.dtype)).sum(0)


@functools.cache
def compiled_rows() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """:func:`project_rows` and :func:`expand_rows`, compiled."""
    return (
        Compiled(project_rows, ((0, 1), (0,), (0,), (0,))),
        Compiled(expand_rows, ((0, 1), (0,), (0,), (0, 1))),
    )


class RowProducts:
    """The compiled products for one layout.

    Args:
        layout: The flat vector.
        device: Where the rows are.
    """

    def __init__(self, layout: ParameterLayout, device: torch.device) -> None:
        blocks = layout.block_columns
        # blocks without columns end where the one before them does
        ends = list(itertools.accumulate((columns.stop for columns in blocks), max))
        starts: list[int] = []
        stops: list[int] = []
        self._of_block: list[slice] = []
        for columns in blocks:
            before = len(starts)
            for start in range(columns.start, columns.stop, COLUMNS):
                starts.append(start)
                stops.append(min(start + COLUMNS, columns.stop))
            self._of_block.append(slice(before, len(starts)))
        self._starts, self._stops, self._ends = (
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (starts, stops, ends)
        )

    def project(self, rows: Tensor, g: Tensor) -> Tensor:
        """``(k, B)`` from the rows and a vector ``(D,)``."""
        parts = compiled_rows()[0](rows, self._starts, self._stops, g)
        if len(self._of_block) == 1:
            return parts.sum(0, dtype=widest(rows.device)).unsqueeze(1)
        sums = [parts[part].sum(0, dtype=widest(rows.device)) for part in self._of_block]
        return torch.stack(sums, dim=1)

    def expand(self, rows: Tensor, center: Tensor, x: Tensor) -> Tensor:
        """``(D,)`` from the rows, the center and coefficients ``(k, B)`` of its dtype."""
        return compiled_rows()[1](rows, center, self._ends, x)
