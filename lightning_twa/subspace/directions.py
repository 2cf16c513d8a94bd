"""The directions ``u`` in memory: dense rows, or really packed low-bit codes.

Both give the same two products, ``project`` and ``expand``, on tensors in the model's own shapes,
and hold nothing of the length of the whole vector in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_twa.subspace import kernels
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.packing import GROUP, dequantize, pack, quantize, unpack

__all__ = ["DenseDirections", "Directions", "PackedDirections"]

TILE_GROUPS = (
    64  # groups per tile; a tile of 60 rows at 4 bits is 240 KiB, which a core's cache holds
)
TILE = TILE_GROUPS * GROUP
DENSE_COLUMNS = 1 << 14  # columns that are converted at a time where rows are kept in 16 bits
COMPILE_ENTRIES = 1 << 27  # below this many entries a phase is over before compiling has paid
CHUNK_TILES = {"cpu": 64, "cuda": 512}  # tiles per call of a compiled kernel


class Directions(Protocol):
    """``k`` directions of ``D`` columns."""

    num_directions: int
    error: float
    """Relative error of what is stored, ``||u - stored|| / ||u||``."""

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

    def close(self) -> None:
        """All columns are written."""

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

    def close(self) -> None:
        """Compute the error."""
        self.error = _relative(*self._squares)

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
            theta = [
                torch.addmv(center[part], rows.T, x[:, spec.block])
                for part, rows in self._columns(slice(spec.start, spec.stop))
            ]
            if theta:
                flat = theta[0] if len(theta) == 1 else torch.cat(theta)
                target.copy_(flat.view(spec.shape))

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        return self.rows.to(self.layout.dtype)


@dataclass(frozen=True)
class _Piece:
    """Consecutive columns of one tensor inside one tile."""

    tensor: int
    source: slice  # of the tensor's elements
    target: slice  # of the padded vector


class PackedDirections:
    """Group-scaled codes of 1 to 8 bits; see :mod:`~lightning_twa.subspace.packing`.

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
        self._pieces, self._block_tiles = _pad(layout)
        tiles = self._block_tiles[-1].stop
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
        self._real = torch.zeros(
            TILE, dtype=torch.bool
        )  # columns of the buffer that are no padding
        self._next_piece = 0

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
        taken = 0
        while taken < values.shape[1]:
            piece = self._pieces[self._next_piece]
            tile, offset = divmod(piece.target.start, TILE)
            if tile != self._tile:
                self._flush()
                self._tile = tile
            spec = self.layout.specs[piece.tensor]
            done = columns.start + taken - spec.start - piece.source.start
            size = min(piece.source.stop - piece.source.start - done, values.shape[1] - taken)
            start = offset + done
            self._buffer[:, start : start + size] = values[:, taken : taken + size]
            self._real[start : start + size] = True
            taken += size
            if done + size == piece.source.stop - piece.source.start:
                self._fill_group(start + size)
                self._next_piece += 1

    def _fill_group(self, stop: int) -> None:
        """Pad the group that a tensor ends in with copies of its entries, so that padding does not
        pull the group's scale.
        """
        first = (stop - 1) // GROUP * GROUP
        padding = torch.arange(stop, first + GROUP)
        self._buffer[:, padding] = self._buffer[:, first + (padding - stop) % (stop - first)]

    def _flush(self) -> None:
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

    def close(self) -> None:
        """Pack the last tile and compute the error."""
        self._flush()
        self._buffer = self._buffer[:, :0]
        self.error = _relative(*self._squares)

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """First tile, one past the last, and how many of them an earlier chunk has covered.

        Every chunk has the same size, so that one compiled kernel serves them all; the last one
        overlaps its neighbour instead of being shorter.
        """
        tiles = self.scales.shape[0]
        size = min(CHUNK_TILES.get(self.scales.device.type, 64), tiles)
        for start in range(0, tiles, size):
            first = min(start, tiles - size)
            yield first, first + size, start - first

    def _run(self, which: int, first: int, last: int, vector: Tensor) -> Tensor:
        """Call ``project`` (0) or ``expand`` (1) for some tiles; fall back where compiling "
        "fails.
        """
        planes = tuple(plane[first:last] for plane in self.planes)
        if self._path == "compiled":
            try:
                kernel = kernels.compiled_kernels()[which]
                return kernel(planes, self.scales[first:last], vector, self.bits)
            except Exception as error:
                warnings.warn(
                    f"The kernels of the packed basis could not be compiled, so the slower tiled "
                    f"ones "
                    f"are used: {type(error).__name__}: {str(error).splitlines()[0]}",
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
        buffer = None
        for first, last, covered in self._chunks():
            if buffer is None:
                buffer = torch.zeros((last - first) * TILE, dtype=dtype, device=device)
            else:
                buffer.zero_()  # padding has codes, so its gradient must be zero
            for piece in self._pieces_of(first, last):
                gradient = flat[piece.tensor]
                if gradient is not None:
                    start = piece.target.start - first * TILE
                    stop = piece.target.stop - first * TILE
                    buffer[start:stop] = gradient[piece.source]
            tiles = buffer.view(-1, TILE_GROUPS, GROUP)
            parts[first + covered : last] = self._run(0, first, last, tiles)[covered:]
        sums = [parts[tiles].sum(0, dtype=torch.float64) for tiles in self._block_tiles]
        return torch.stack(sums, dim=1).to("cpu")

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        by_block = coefficients.to(center).T
        counts = torch.tensor([t.stop - t.start for t in self._block_tiles], device=center.device)
        x = by_block.repeat_interleave(counts, dim=0)
        staged: dict[int, Tensor] = {}
        for first, last, covered in self._chunks():
            values = self._run(1, first, last, x[first:last]).reshape(-1)
            for piece in self._pieces_of(first + covered, last):
                spec, target = self.layout.specs[piece.tensor], out[piece.tensor]
                flat = _flat_view(target, center)
                if flat is None:
                    flat = staged.setdefault(piece.tensor, center.new_empty(spec.stop - spec.start))
                start = piece.target.start - first * TILE
                columns = slice(spec.start + piece.source.start, spec.start + piece.source.stop)
                torch.add(
                    center[columns],
                    values[start : start + columns.stop - columns.start],
                    out=flat[piece.source],
                )
                if piece.source.stop == spec.stop - spec.start and piece.tensor in staged:
                    target.copy_(staged.pop(piece.tensor).view(spec.shape))

    def _pieces_of(self, first: int, last: int) -> Iterator[_Piece]:
        """The pieces that lie in some tiles."""
        return (p for p in self._pieces if first * TILE <= p.target.start < last * TILE)

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        dtype = self.layout.dtype
        result = self.scales.new_zeros(self.num_directions, self.layout.numel, dtype=dtype)
        for piece in self._pieces:
            tile, start = divmod(piece.target.start, TILE)
            codes = unpack(tuple(plane[tile] for plane in self.planes), self.bits)
            values = dequantize(codes, self.scales[tile], self.bits, dtype).flatten(1)
            size = piece.source.stop - piece.source.start
            column = self.layout.specs[piece.tensor].start + piece.source.start
            result[:, column : column + size] = values[:, start : start + size]
        return result


def _pad(layout: ParameterLayout) -> tuple[list[_Piece], list[slice]]:
    """Places of the tensors in the padded vector, and each block's tiles."""
    pieces: list[_Piece] = []
    block_tiles: list[slice] = []
    position, block, first_tile = 0, 0, 0
    for i, spec in enumerate(layout.specs):
        if spec.block != block:
            position = _round_up(position, TILE)
            block_tiles.append(slice(first_tile, position // TILE))
            first_tile, block = position // TILE, spec.block
        position = _round_up(position, GROUP)
        element, size = 0, spec.stop - spec.start
        while element < size:
            room = TILE - position % TILE
            stop = min(element + room, size)
            target = slice(position, position + stop - element)
            pieces.append(_Piece(i, slice(element, stop), target))
            position, element = target.stop, stop
    block_tiles.append(slice(first_tile, _round_up(position, TILE) // TILE))
    return pieces, block_tiles


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flat_view(target: Tensor, like: Tensor) -> Tensor | None:
    """The target as a vector that can be written directly, ``None`` where it must be copied "
    "into.
    """
    same = target.dtype == like.dtype and target.device == like.device
    return target.view(-1) if same and target.is_contiguous() else None


def _relative(error: float, norm: float) -> float:
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
