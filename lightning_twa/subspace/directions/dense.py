"""Directions as dense rows, in full precision or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_twa.subspace.directions.interface import SquaredErrors, Total
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import flat_view

__all__ = ["DenseDirections"]

DENSE_COLUMNS = 1 << 14  # columns that are converted at a time where rows are kept in 16 bits


class DenseDirections:
    """Rows in full precision (the layout's dtype) or in bfloat16.

    Args:
        layout: The flat vector.
        num_directions: ``k``.
        dtype: Dtype of the rows.
        device: Where they are kept.
    """

    def __init__(
        self, layout: ParameterLayout, num_directions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_directions = num_directions
        self.rows = torch.empty(num_directions, layout.numel, dtype=dtype, device=device)
        self._squares = SquaredErrors()
        self.error = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    @property
    def path(self) -> str:
        """Dense products."""
        return "dense"

    def write(self, columns: slice, values: Tensor) -> None:
        """Take the next columns; see :class:`Directions`."""
        stored = values.to(self.rows.dtype)
        self.rows[:, columns] = stored.to(self.rows.device)
        self._squares.add(stored, values)

    def close(self, total: Total = lambda squares: squares) -> None:
        """See :class:`Directions`."""
        self.error = self._squares.relative(total)

    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """Nothing to compile."""

    def _columns(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows of some columns in the layout's dtype: at once, or a few at a time if converted."""
        dtype = self.layout.dtype
        step = columns.stop - columns.start if self.rows.dtype == dtype else DENSE_COLUMNS
        for start in range(columns.start, columns.stop, max(step, 1)):
            part = slice(start, min(start + step, columns.stop))
            yield part, self.rows[:, part].to(dtype)

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`Subspace.project`."""
        layout = self.layout
        result = self.rows.new_zeros(self.num_directions, layout.num_blocks, dtype=layout.dtype)
        for spec, gradient in zip(layout.specs, gradients, strict=True):
            if gradient is None:
                continue
            flat = gradient.reshape(-1).to(result)
            for part, rows in self._columns(slice(spec.start, spec.stop)):
                local = flat[part.start - spec.start : part.stop - spec.start]
                result[:, spec.block] += rows @ local
        return result.cpu().double()

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        x = coefficients.to(center.dtype).to(center.device)
        for spec, target in zip(self.layout.specs, out, strict=True):
            flat = flat_view(target, center)
            staged = flat if flat is not None else center.new_empty(spec.stop - spec.start)
            for part, rows in self._columns(slice(spec.start, spec.stop)):
                local = slice(part.start - spec.start, part.stop - spec.start)
                torch.addmv(center[part], rows.T, x[:, spec.block], out=staged[local])
            if flat is None:
                target.copy_(staged.view(spec.shape))

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        return self.rows.to(self.layout.dtype)
