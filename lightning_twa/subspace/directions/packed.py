"""Directions as low-bit codes, really packed: see :mod:`~lightning_twa.subspace.directions.codec`.

Both products read the codes, a chunk of tiles at a time, and hold nothing of the length of the
whole vector in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_twa.subspace.directions import kernels
from lightning_twa.subspace.directions.chunks import Scatter, gather
from lightning_twa.subspace.directions.codec import (
    GROUP,
    PLANES,
    SCALE_DTYPE,
    dequantize,
    pack,
    quantize,
    unpack,
)
from lightning_twa.subspace.directions.interface import (
    fill,
    relative,
    squared_error,
    squared_errors,
)
from lightning_twa.subspace.directions.padding import fill_group, pad_groups
from lightning_twa.subspace.directions.scratch import Scratch
from lightning_twa.subspace.directions.tiles import TILE, TILE_GROUPS, pad
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import is_accelerator, widest, without_autocast

__all__ = ["PackedDirections", "stored_bytes"]

COMPILE_ENTRIES = 1 << 26  # below this many entries a phase is over before compiling has paid
CHUNK_TILES = {"cpu": 64}  # tiles per call of a kernel
# On accelerators, where a call costs more than what is in between: at most so many calls, of at
# least so many tiles, which hold 256 MiB in between.
CALLS, TILES_PER_CALL = 4, 1 << 13


class PackedDirections:
    """Group-scaled codes of 1 to 8 bits of the padded flat vector.

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
        self._padded = pad(layout)
        tiles = self._padded.num_tiles
        # Whether tensors are copied all at once, and not one after the other
        self.at_once = is_accelerator(device)
        size = CHUNK_TILES["cpu"]
        if self.at_once:
            size = max(TILES_PER_CALL, -(-tiles // CALLS))
        self._chunks = self._padded.chunks(size)
        # of each tile
        self._block = torch.tensor(self._padded.block_of_tile, dtype=torch.int64, device=device)
        k = num_directions
        self.planes = tuple(
            torch.zeros(tiles, TILE_GROUPS * width // 8, k, GROUP, dtype=torch.uint8, device=device)
            for width in PLANES[bits]
        )
        self.scales = torch.zeros(tiles, TILE_GROUPS, k, dtype=SCALE_DTYPE, device=device)
        if path == "auto":
            large = tiles * TILE * k >= COMPILE_ENTRIES
            path = "compiled" if large or device.type in kernels.COMPILES else "tiled"
        self._path = path
        self._worked = [False, False]  # which of the compiled kernels have
        self._spans = self._padded.spans_of_tiles()
        # Codes have no zero: columns in which all directions are zero, if there are any
        self._still: Tensor | None = torch.zeros(tiles, TILE, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        still = 0 if self._still is None else self._still.nbytes
        return sum(plane.nbytes for plane in self.planes) + self.scales.nbytes + still

    @property
    def path(self) -> str:
        """``"compiled"`` or ``"tiled"``."""
        return self._path

    def write(self, tile: int, values: Tensor, scratch: Scratch) -> Tensor:
        """See :class:`Directions`."""
        spans, width = self._spans[tile], values.shape[1]
        padding = []
        for span in spans:
            stop, end = span.target.stop, -(-span.target.stop // GROUP) * GROUP
            if stop < end:  # only at the end of a tensor
                padding.append(slice(stop, end))
                fill_group(values, stop)
        groups = values.view(self.num_directions, -1, GROUP)
        found, scales = quantize(groups, self.bits, scratch)
        codes = found
        if width < TILE:
            codes = found.new_zeros(self.num_directions, TILE_GROUPS, GROUP)
            codes[:, : groups.shape[1]] = found
        for plane, packed in zip(self.planes, pack(codes, self.bits), strict=True):
            plane[tile] = packed.transpose(0, 1).to(plane.device)
        self.scales[tile, : groups.shape[1]] = scales.T.to(self.scales.device)
        stored = scratch.take("work", tuple(groups.shape), values.dtype)
        dequantize(found, scales, self.bits, values.dtype, out=stored)
        stored = stored.view(values.shape)
        self._keep_still(tile, values, stored, padding, scratch)
        for part in padding:  # it is no column
            values[:, part] = stored[:, part] = 0.0
        return squared_error(stored, values)

    def _keep_still(
        self,
        tile: int,
        values: Tensor,
        stored: Tensor,
        padding: Sequence[slice],
        scratch: Scratch,
    ) -> None:
        """Note in which columns all values are zero, and have zeros stored there."""
        magnitudes = torch.abs(
            values, out=scratch.take("levels", tuple(values.shape), values.dtype)
        )
        still = magnitudes.amax(0) == 0
        if not bool(still.any()):
            return
        real = still.clone()
        for part in padding:
            real[part] = False
        if not bool(real.any()):
            return
        stored[:, still] = 0.0
        assert self._still is not None
        self._still[tile, : len(still)] = still.to(self._still.device)

    def write_tiles(self, first: int, values: Tensor, scratch: Scratch) -> Tensor:
        """See :class:`Directions`."""
        assert self._still is not None
        tiles = slice(first, first + len(values))
        real = pad_groups(values, self._spans[tiles])
        found, scales = quantize(
            values.view(*values.shape[:2], -1, GROUP), self.bits, scratch, look=False
        )
        for plane, packed in zip(self.planes, pack(found, self.bits), strict=True):
            plane[tiles] = packed.transpose(1, 2)
        self.scales[tiles] = scales.transpose(1, 2)
        stored = scratch.take("work", tuple(found.shape), values.dtype)
        dequantize(found, scales, self.bits, values.dtype, out=stored)
        stored = stored.view(values.shape)
        still = (values == 0).all(dim=1)
        if real is not None:
            still &= real
            for each in (values, stored):
                each.masked_fill_(~real.unsqueeze(1), 0.0)
        self._still[tiles] = still
        return squared_errors(stored.masked_fill_(still.unsqueeze(1), 0.0), values)

    def pieces(self, tiles: slice) -> list[Tensor]:
        """See :class:`Directions`."""
        assert self._still is not None
        return [tensor[tiles] for tensor in (*self.planes, self.scales, self._still)]

    def close(self, squares: Tensor) -> None:
        """See :class:`Directions`."""
        self.error = relative(squares)
        self._spans = []
        assert self._still is not None
        if self._still.is_meta or not bool(self._still.any()):
            self._still = None

    def state_dict(self) -> dict[str, Tensor]:
        """See :class:`Directions`."""
        planes = {f"plane.{i}": plane for i, plane in enumerate(self.planes)}
        still = {} if self._still is None else {"still": self._still}
        return {**planes, "scales": self.scales, **still}

    def load_state_dict(
        self, state: Mapping[str, Tensor], error: float, *, shares: bool = False
    ) -> None:
        """See :class:`Directions`."""
        if "still" not in state:
            self._still = None
        filled = fill(self.state_dict(), state, shares=shares)
        self.planes = tuple(filled[f"plane.{i}"] for i in range(len(self.planes)))
        self.scales, self._still = filled["scales"], filled.get("still")
        self.error, self._spans = error, []

    @torch.no_grad()
    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """See :class:`Directions`. In the modes of a step, or torch would compile again there."""
        if self._path == "compiled" and self._chunks:
            chunk = self._chunks[0]
            size = chunk.last - chunk.first
            dtype = self.layout.dtype
            with without_autocast(self.scales.device):
                for i, shape in enumerate(
                    ((size, TILE_GROUPS, GROUP), (size, self.num_directions))
                ):
                    vector = self.scales.new_zeros(shape, dtype=dtype)
                    self._run(i, chunk.first, chunk.last, vector)
        if not agree(self._path == "compiled"):
            self._path = "tiled"

    def _run(self, which: int, first: int, last: int, vector: Tensor) -> Tensor:
        """Call ``project`` (0) or ``expand`` (1) for some tiles; tiled where compiling fails."""
        planes = tuple(plane[first:last] for plane in self.planes)
        if self._path == "compiled":
            try:
                kernel = kernels.compiled_kernels(self.at_once)[which]
                found = kernel(planes, self.scales[first:last], vector, self.bits)
                self._worked[which] = True
                return found
            except Exception as error:
                kernels.warn_of_compiler(error, worked=self._worked[which])
                self._path = "tiled"
        tiled = (kernels.project_by_tile, kernels.expand_by_tile)[which]
        return tiled(planes, self.scales[first:last], vector, self.bits)

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`Subspace.project`."""
        dtype, device = self.layout.dtype, self.scales.device
        parts = torch.empty(self.scales.shape[0], self.num_directions, dtype=dtype, device=device)
        size = max((chunk.last - chunk.first for chunk in self._chunks), default=0) * TILE
        buffer = torch.empty(size, dtype=dtype, device=device)
        for chunk in self._chunks:
            buffer.zero_()  # padding has codes, so its gradient must be zero
            gather(chunk, gradients, buffer, at_once=self.at_once)
            if self._still is not None:
                buffer.masked_fill_(self._still[chunk.first : chunk.last].view(-1), 0.0)
            tiles = buffer.view(-1, TILE_GROUPS, GROUP)
            found = self._run(0, chunk.first, chunk.last, tiles)
            parts[chunk.first + chunk.covered : chunk.last] = found[chunk.covered :]
        # in one operation, whatever the number of tiles
        blocks = [parts[tiles] for tiles in self._padded.block_tiles]
        return torch.stack([block.sum(0, dtype=widest(device)) for block in blocks], dim=1)

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""
        by_block = coefficients.to(center.dtype).to(center.device).T
        x = by_block.index_select(0, self._block)
        into = Scatter(self.layout, center, out, at_once=self.at_once)
        for chunk in self._chunks:
            values = self._run(1, chunk.first, chunk.last, x[chunk.first : chunk.last]).reshape(-1)
            if self._still is not None:
                values.masked_fill_(self._still[chunk.first : chunk.last].view(-1), 0.0)
            into.write(chunk, values)

    def dense(self) -> Tensor:
        """``(k, D)`` in the layout's dtype."""
        dtype = self.layout.dtype
        result = self.scales.new_zeros(self.num_directions, self.layout.numel, dtype=dtype)
        for tile in range(self.scales.shape[0]):
            planes = tuple(plane[tile].transpose(0, 1) for plane in self.planes)
            codes, scales = unpack(planes, self.bits), self.scales[tile].T
            values = dequantize(codes, scales, self.bits, dtype).flatten(1)
            if self._still is not None:
                values.masked_fill_(self._still[tile], 0.0)
            for span in self._padded.spans(tile * TILE, (tile + 1) * TILE, tile * TILE):
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
    per_group = GROUP * bits // 8 + SCALE_DTYPE.itemsize
    return pad(layout).num_tiles * TILE_GROUPS * num_directions * per_group
