"""Directions as dense rows, in full precision or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_twa.subspace.directions import kernels
from lightning_twa.subspace.directions.interface import (
    fill,
    relative,
    squared_error,
    squared_errors,
)
from lightning_twa.subspace.directions.rows import RowProducts
from lightning_twa.subspace.directions.scratch import Scratch
from lightning_twa.subspace.directions.tiles import pad
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import (
    copy_all,
    flat_view,
    is_accelerator,
    pieces,
    widest,
    without_autocast,
)

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
        self._spans = pad(layout).spans_of_tiles()
        self.error = 0.0
        # Whether all tensors are one vector on the way, as an operation for each costs on a device
        self.at_once = is_accelerator(device)
        # Rows that are converted, and blocks, would else take an operation for each part of them
        apart = dtype != layout.dtype or layout.num_blocks > 1
        self.compiles = device.type in kernels.COMPILES and apart
        self._worked: set[str] = set()  # the compiled products that have
        self._products: RowProducts | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    @property
    def path(self) -> str:
        """Dense products."""
        return "dense"

    def write(self, tile: int, values: Tensor, scratch: Scratch) -> Tensor:
        """See :class:`Directions`."""
        squares = torch.zeros(2, dtype=torch.float64, device="cpu")
        for span in self._spans[tile]:
            first = self.layout.specs[span.tensor].start
            columns = slice(first + span.source.start, first + span.source.stop)
            exact = values[:, span.target]
            self.rows[:, columns] = exact
            if self.rows.dtype != values.dtype:
                stored = scratch.take("stored", tuple(exact.shape), values.dtype)
                squares += squared_error(stored.copy_(exact.to(self.rows.dtype)), exact)
            else:
                squares[1] += torch.linalg.vector_norm(exact, dim=-1).double().square().sum()
        return squares

    def write_tiles(self, first: int, values: Tensor, scratch: Scratch) -> Tensor:
        """See :class:`Directions`."""
        for spans, exact in zip(self._spans[first : first + len(values)], values, strict=True):
            for span in spans:
                start = self.layout.specs[span.tensor].start
                columns = slice(start + span.source.start, start + span.source.stop)
                self.rows[:, columns] = exact[:, span.target]
        stored = scratch.take("stored", tuple(values.shape), values.dtype)
        return squared_errors(stored.copy_(values.to(self.rows.dtype)), values)

    def pieces(self, tiles: slice) -> list[Tensor]:
        """See :class:`Directions`."""
        spans = [span for tile in self._spans[tiles] for span in tile]
        if not spans:
            return []
        first, last = (self.layout.specs[span.tensor].start for span in (spans[0], spans[-1]))
        columns = slice(first + spans[0].source.start, last + spans[-1].source.stop)
        return [row[columns] for row in self.rows]

    def close(self, squares: Tensor) -> None:
        """See :class:`Directions`."""
        self.error = relative(squares)
        self._spans = []

    def state_dict(self) -> dict[str, Tensor]:
        """See :class:`Directions`."""
        return {"rows": self.rows}

    def load_state_dict(
        self, state: Mapping[str, Tensor], error: float, *, shares: bool = False
    ) -> None:
        """See :class:`Directions`."""
        self.rows = fill(self.state_dict(), state, shares=shares)["rows"]
        self.error, self._spans = error, []

    @torch.no_grad()
    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """See :class:`Directions`. On the CPU there is nothing to compile."""
        if self.compiles and self.layout.numel:
            layout = self.layout
            vector = self.rows.new_zeros(layout.numel, dtype=layout.dtype)
            x = vector.new_zeros(self.num_directions, layout.num_blocks)
            with without_autocast(self.rows.device):
                self._project(vector)
                self._expand(x, vector)
        if not agree(self.compiles):
            self.compiles = False

    def _project(self, g: Tensor) -> Tensor:
        """``(k, B)`` from a flat vector."""
        found = self._compiled("project", g)
        if found is not None:
            return found
        layout = self.layout
        if self.rows.dtype == layout.dtype and layout.num_blocks == 1:
            return torch.mv(self.rows, g).unsqueeze(1)
        result = g.new_zeros(self.num_directions, layout.num_blocks)
        for block, columns in enumerate(layout.block_columns):
            for part, rows in self._columns(columns):
                result[:, block] += rows @ g[part]
        return result

    def _expand(self, x: Tensor, center: Tensor) -> Tensor:
        """The flat vector of coefficients ``(k, B)``."""
        found = self._compiled("expand", center, x)
        if found is not None:
            return found
        if self.rows.dtype == center.dtype and self.layout.num_blocks == 1:
            return torch.addmv(center, self.rows.T, x[:, 0])
        theta = torch.empty_like(center)
        for block, columns in enumerate(self.layout.block_columns):
            for part, rows in self._columns(columns):
                torch.addmv(center[part], rows.T, x[:, block], out=theta[part])
        return theta

    def _compiled(self, name: str, *vectors: Tensor) -> Tensor | None:
        """A compiled product; ``None`` where there is none."""
        if not self.compiles or not self.layout.numel:
            return None
        try:
            if self._products is None:
                self._products = RowProducts(self.layout, self.rows.device)
            found: Tensor = getattr(self._products, name)(self.rows, *vectors)
        except Exception as error:
            kernels.warn_of_compiler(error, worked=name in self._worked)
            self.compiles = False
            return None
        self._worked.add(name)
        return found

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """Of a flat vector each tensor's, flat."""
        specs = self.layout.specs
        return pieces(
            vector, [spec.start for spec in specs], [spec.stop - spec.start for spec in specs]
        )

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
        if self.at_once:
            missing = any(gradient is None for gradient in gradients)
            make = self.rows.new_zeros if missing else self.rows.new_empty
            g = make(layout.numel, dtype=layout.dtype)
            pairs = zip(self._pieces(g), gradients, strict=True)
            held = [(piece, found) for piece, found in pairs if found is not None]
            copy_all([piece for piece, _ in held], [found for _, found in held])
            return self._project(g).to(widest(g.device))
        result = self.rows.new_zeros(self.num_directions, layout.num_blocks, dtype=layout.dtype)
        for spec, gradient in zip(layout.specs, gradients, strict=True):
            if gradient is None:
                continue
            flat = gradient.reshape(-1).to(result)
            for part, rows in self._columns(slice(spec.start, spec.stop)):
                local = flat[part.start - spec.start : part.stop - spec.start]
                result[:, spec.block] += rows @ local
        return result.to(widest(result.device))

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        x = coefficients.to(center.dtype).to(center.device)
        if self.at_once:
            copy_all(out, self._pieces(self._expand(x, center)))
            return
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
