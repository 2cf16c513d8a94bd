"""The directions ``u`` in memory: dense rows, or really packed low-bit codes.

Both give the same two products, ``project`` and ``expand``, on tensors in the model's own shapes,
and hold nothing of the length of the whole vector in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_twa.subspace.directions import kernels
from lightning_twa.subspace.directions.codec import GROUP, dequantize, pack, quantize, unpack
from lightning_twa.subspace.layout import TILE, TILE_GROUPS, ParameterLayout, pad

__all__ = ["DenseDirections", "Directions", "PackedDirections", "stored_bytes"]

DENSE_COLUMNS = 1 << 14  # columns that are converted at a time where rows are kept in 16 bits
COMPILE_ENTRIES = 1 << 26  # below this many entries a phase is over before compiling has paid
CHUNK_TILES = {"cpu": 64, "cuda": 512}  # tiles per call of a compiled kernel


Total = Callable[[Tensor], Tensor]


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
            total: The sum of a float64 tensor on the CPU over the processes that share the columns.
        """

    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """Compile what is to be compiled, where that works in every process that shares the
        subspace: the same sums in another order would give them other weights.

        Args:
            agree: Whether its argument is true in every process; all of them call it.
        """

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """``(k, B)`` float64 on the CPU; see :meth:`Subspace.project`."""

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""

    def dense(self) -> Tensor:
        """``(k, D)`` what is stored, in the layout's dtype; for inspection."""


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
        self._squares = [0.0, 0.0]
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
        self._squares[0] += float((stored.double() - values).square().sum())
        self._squares[1] += float(values.square().sum())

    def close(self, total: Total = lambda squares: squares) -> None:
        """See :class:`Directions`."""
        self.error = _relative(total(torch.tensor(self._squares, dtype=torch.float64)))

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
        return result.to(device="cpu", dtype=torch.float64)

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        x = coefficients.to(center)
        for spec, target in zip(self.layout.specs, out, strict=True):
            flat = _flat_view(target, center)
            staged = flat if flat is not None else center.new_empty(spec.stop - spec.start)
            for part, rows in self._columns(slice(spec.start, spec.stop)):
                local = slice(part.start - spec.start, part.stop - spec.start)
                torch.addmv(center[part], rows.T, x[:, spec.block], out=staged[local])
            if flat is None:
                target.copy_(staged.view(spec.shape))

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        return self.rows.to(self.layout.dtype)


@dataclass(frozen=True)
class _Span:
    """Consecutive columns of one tensor in a stretch of the padded vector."""

    tensor: int
    source: slice  # of the tensor's elements
    target: slice  # of the stretch


@dataclass(frozen=True)
class _Chunk:
    """Tiles that one call of a kernel takes."""

    first: int
    last: int
    covered: int  # so many of them an earlier chunk has done
    gather: list[_Span]  # all of the chunk's columns
    scatter: list[_Span]  # without the covered ones


class PackedDirections:
    """Group-scaled codes of 1 to 8 bits; see :mod:`~lightning_twa.subspace.directions.codec`.

    The flat vector is padded: tensors start at a group, so that tensors of different magnitude
    never share a scale, and blocks start at a tile.

    Args:
        layout: The flat vector.
        num_directions: ``k``.
        bits: 1 to 8.
        device: Where the codes are kept.
        path: ``"auto"`` compiles the products where that pays and works; ``"compiled"`` and
            ``"tiled"`` choose (for tests and benchmarks).
    """

    def __init__(
        self,
        layout: ParameterLayout,
        num_directions: int,
        bits: int,
        device: torch.device,
        path: str = "auto",
    ) -> None:
        self.layout = layout
        self.num_directions = num_directions
        self.bits = bits
        self.error = 0.0
        self._starts, self._block_tiles = pad(layout)
        tiles = self._block_tiles[-1].stop
        self._chunks = self._cut(tiles, CHUNK_TILES.get(device.type, 64))
        k = num_directions
        codes = torch.zeros(1, k, TILE_GROUPS, GROUP, dtype=torch.uint8)
        self.planes = tuple(
            torch.zeros(tiles, *plane.shape[1:], dtype=torch.uint8, device=device)
            for plane in pack(codes, bits)
        )
        self.scales = torch.zeros(tiles, k, TILE_GROUPS, dtype=torch.bfloat16, device=device)
        if path == "auto":
            path = "compiled" if tiles * TILE * k >= COMPILE_ENTRIES else "tiled"
        self._path = path
        self._squares = [0.0, 0.0]
        self._tile = 0
        self._buffer = torch.zeros(k, TILE, dtype=torch.float64)
        self._real = torch.zeros(TILE, dtype=torch.bool)  # which of its columns are no padding
        self._tensor = 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        return sum(plane.nbytes for plane in self.planes) + self.scales.nbytes

    @property
    def path(self) -> str:
        """``"compiled"`` or ``"tiled"``."""
        return self._path

    def write(self, columns: slice, values: Tensor) -> None:
        """Take the next columns; see :class:`Directions`. Full tiles are packed at once."""
        specs = self.layout.specs
        while specs[self._tensor].stop <= columns.start:
            self._tensor += 1
        shift = self._starts[self._tensor] - specs[self._tensor].start
        column = columns.start
        while column < columns.stop:
            tile, start = divmod(column + shift, TILE)
            if tile != self._tile:
                self._flush()
                self._tile = tile
            size = min(TILE - start, columns.stop - column)
            taken = column - columns.start
            self._buffer[:, start : start + size] = values[:, taken : taken + size]
            self._real[start : start + size] = True
            column += size
            if column == specs[self._tensor].stop:
                self._fill_group(start + size)

    def _fill_group(self, stop: int) -> None:
        """Pad the group that a tensor ends in with copies of its entries, so that padding does not
        pull the group's scale.
        """
        first = (stop - 1) // GROUP * GROUP
        padding = torch.arange(stop, first + GROUP)
        self._buffer[:, padding] = self._buffer[:, first + (padding - stop) % (stop - first)]

    def _flush(self) -> None:
        if not bool(self._real.any()):  # nothing is held here
            return
        values = self._buffer.view(-1, TILE_GROUPS, GROUP)
        codes, scales = quantize(values, self.bits)
        for plane, packed in zip(self.planes, pack(codes, self.bits), strict=True):
            plane[self._tile] = packed.to(plane.device)
        self.scales[self._tile] = scales.to(self.scales.device)
        stored = dequantize(codes, scales, self.bits, torch.float64).flatten(1)[:, self._real]
        exact = self._buffer[:, self._real]
        self._squares[0] += float((stored - exact).square().sum())
        self._squares[1] += float(exact.square().sum())
        self._buffer.zero_()
        self._real.zero_()

    def close(self, total: Total = lambda squares: squares) -> None:
        """See :class:`Directions`. Packs the last tile."""
        self._flush()
        self._buffer = self._buffer[:, :0]
        self.error = _relative(total(torch.tensor(self._squares, dtype=torch.float64)))

    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """See :class:`Directions`."""
        if self._path == "compiled":
            chunk = self._chunks[0]
            size = chunk.last - chunk.first
            dtype = self.layout.dtype
            for i, shape in enumerate(((size, TILE_GROUPS, GROUP), (size, self.num_directions))):
                vector = self.scales.new_zeros(shape, dtype=dtype)
                self._run(i, chunk.first, chunk.last, vector)
        if not agree(self._path == "compiled"):
            self._path = "tiled"

    def _cut(self, tiles: int, size: int) -> list[_Chunk]:
        """Chunks of one size, so that one compiled kernel serves them all; the last one overlaps
        its neighbour instead of being shorter.
        """
        chunks = []
        size = max(min(size, tiles), 1)
        for start in range(0, tiles, size):
            first = min(start, tiles - size)
            begin, end = first * TILE, (first + size) * TILE
            gather = list(self._spans(begin, end, begin))
            scatter = list(self._spans(start * TILE, end, begin))
            chunks.append(_Chunk(first, first + size, start - first, gather, scatter))
        return chunks

    def _spans(self, begin: int, end: int, origin: int) -> Iterator[_Span]:
        """The tensors' parts between two positions of the padded vector, from ``origin`` on."""
        for i, (spec, start) in enumerate(zip(self.layout.specs, self._starts, strict=True)):
            low, high = max(begin, start), min(end, start + spec.stop - spec.start)
            if low < high:
                yield _Span(i, slice(low - start, high - start), slice(low - origin, high - origin))

    def _run(self, which: int, first: int, last: int, vector: Tensor) -> Tensor:
        """Call ``project`` (0) or ``expand`` (1) for some tiles; tiled where compiling fails."""
        planes = tuple(plane[first:last] for plane in self.planes)
        if self._path == "compiled":
            try:
                kernel = kernels.compiled_kernels()[which]
                return kernel(planes, self.scales[first:last], vector, self.bits)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                warnings.warn(
                    f"The kernels of the packed basis could not be compiled, so the slower tiled "
                    f"ones are used: {reason}",
                    stacklevel=2,
                )
                self._path = "tiled"
        tiled = (kernels.project_by_tile, kernels.expand_by_tile)[which]
        return tiled(planes, self.scales[first:last], vector, self.bits)

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`Subspace.project`."""
        dtype, device = self.layout.dtype, self.scales.device
        flat = [None if g is None else g.reshape(-1) for g in gradients]
        parts = torch.empty(self.scales.shape[0], self.num_directions, dtype=dtype, device=device)
        size = max((chunk.last - chunk.first for chunk in self._chunks), default=0) * TILE
        buffer = torch.empty(size, dtype=dtype, device=device)
        for chunk in self._chunks:
            buffer.zero_()  # padding has codes, so its gradient must be zero
            for span in chunk.gather:
                gradient = flat[span.tensor]
                if gradient is not None:
                    buffer[span.target] = gradient[span.source]
            tiles = buffer.view(-1, TILE_GROUPS, GROUP)
            found = self._run(0, chunk.first, chunk.last, tiles)
            parts[chunk.first + chunk.covered : chunk.last] = found[chunk.covered :]
        sums = [parts[tiles].sum(0, dtype=torch.float64) for tiles in self._block_tiles]
        return torch.stack(sums, dim=1).to("cpu")

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        by_block = coefficients.to(center).T
        counts = [tiles.stop - tiles.start for tiles in self._block_tiles]
        x = by_block.repeat_interleave(
            torch.tensor(counts, device=center.device), dim=0, output_size=sum(counts)
        )
        staged: dict[int, Tensor] = {}
        for chunk in self._chunks:
            values = self._run(1, chunk.first, chunk.last, x[chunk.first : chunk.last]).reshape(-1)
            for span in chunk.scatter:
                spec, target = self.layout.specs[span.tensor], out[span.tensor]
                flat = _flat_view(target, center)
                if flat is None:
                    flat = staged.setdefault(span.tensor, center.new_empty(spec.stop - spec.start))
                columns = slice(spec.start + span.source.start, spec.start + span.source.stop)
                torch.add(center[columns], values[span.target], out=flat[span.source])
                if columns.stop == spec.stop and span.tensor in staged:
                    target.copy_(staged.pop(span.tensor).view(spec.shape))

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        dtype = self.layout.dtype
        result = self.scales.new_zeros(self.num_directions, self.layout.numel, dtype=dtype)
        for tile in range(self.scales.shape[0]):
            codes = unpack(tuple(plane[tile] for plane in self.planes), self.bits)
            values = dequantize(codes, self.scales[tile], self.bits, dtype).flatten(1)
            for span in self._spans(tile * TILE, (tile + 1) * TILE, tile * TILE):
                first = self.layout.specs[span.tensor].start
                columns = slice(first + span.source.start, first + span.source.stop)
                result[:, columns] = values[:, span.target]
        return result


def stored_bytes(layout: ParameterLayout, num_directions: int, bits: int) -> int:
    """Bytes that directions take, before there are any.

    Args:
        layout: The flat vector.
        num_directions: ``k``.
        bits: 1 to 8, 16 or 32.
    """
    if bits > 8:
        return num_directions * layout.numel * (2 if bits == 16 else layout.dtype.itemsize)
    _, block_tiles = pad(layout)
    per_group = GROUP * bits // 8 + torch.bfloat16.itemsize
    return int(block_tiles[-1].stop * TILE_GROUPS * num_directions * per_group)


def _flat_view(target: Tensor, like: Tensor) -> Tensor | None:
    """The target as a vector to write into, ``None`` where it has to be copied into."""
    same = target.dtype == like.dtype and target.device == like.device
    return target.view(-1) if same and target.is_contiguous() else None


def _relative(squares: Tensor) -> float:
    """Of the sums of squared errors and of squares."""
    error, norm = squares.tolist()
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
