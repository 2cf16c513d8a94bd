"""The padded vector that packed directions cover, in whole tiles.

Tensors start at a group, so that tensors of different magnitude never share a scale, and blocks
start at a tile, so that a tile has one block's coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_twa.subspace.directions.codec import GROUP
from lightning_twa.subspace.layout import ParameterLayout

__all__ = ["TILE", "TILE_GROUPS", "Chunk", "PaddedLayout", "Span", "pad"]

TILE_GROUPS = 64  # per tile: 60 rows of 4 bits are then 240 KiB, which a core's cache holds
TILE = TILE_GROUPS * GROUP


@dataclass(frozen=True)
class Span:
    """Consecutive columns of one tensor in a stretch of the padded vector.

    Args:
        tensor: Index of the tensor.
        source: Of the tensor's elements.
        target: Of the stretch.
    """

    tensor: int
    source: slice
    target: slice


@dataclass(frozen=True)
class Chunk:
    """Tiles that one call of a kernel takes.

    Args:
        first: The first of them.
        last: One past the last.
        covered: So many of them an earlier chunk has done.
        gather: Where all of the chunk's columns come from.
        scatter: Where its columns go, without those of the covered tiles.
    """

    first: int
    last: int
    covered: int
    gather: tuple[Span, ...]
    scatter: tuple[Span, ...]


@dataclass(frozen=True)
class PaddedLayout:
    """Where a layout's tensors and blocks lie in the padded vector. Made by :func:`pad`.

    Args:
        layout: The flat vector.
        starts: Where each tensor starts in the padded one.
        block_tiles: Each block's tiles.
    """

    layout: ParameterLayout
    starts: tuple[int, ...]
    block_tiles: tuple[slice, ...]

    @property
    def num_tiles(self) -> int:
        """All blocks' tiles."""
        return int(self.block_tiles[-1].stop)

    @property
    def block_of_tile(self) -> list[int]:
        """The block that each tile belongs to."""
        return [
            block
            for block, tiles in enumerate(self.block_tiles)
            for _ in range(tiles.start, tiles.stop)
        ]

    def spans_of_tiles(self) -> list[tuple[Span, ...]]:
        """Of each tile the tensors' parts in it, in order; none where all of them are empty."""
        found: list[list[Span]] = [[] for _ in range(self.num_tiles)]
        for i, (spec, start) in enumerate(zip(self.layout.specs, self.starts, strict=True)):
            stop = start + spec.stop - spec.start
            position = start
            while position < stop:
                tile, first = divmod(position, TILE)
                size = min(TILE - first, stop - position)
                source = slice(position - start, position - start + size)
                found[tile].append(Span(i, source, slice(first, first + size)))
                position += size
        return [tuple(spans) for spans in found]

    def spans(self, begin: int, end: int, origin: int) -> Iterator[Span]:
        """The tensors' parts between two positions of the padded vector, from ``origin`` on."""
        for i, (spec, start) in enumerate(zip(self.layout.specs, self.starts, strict=True)):
            low, high = max(begin, start), min(end, start + spec.stop - spec.start)
            if low < high:
                yield Span(i, slice(low - start, high - start), slice(low - origin, high - origin))

    def chunks(self, size: int) -> list[Chunk]:
        """Chunks of one size, so that one compiled kernel serves them all; the last one overlaps
        its neighbour instead of being shorter.

        Args:
            size: Tiles in a chunk, where there are so many.
        """
        chunks = []
        size = max(min(size, self.num_tiles), 1)
        for start in range(0, self.num_tiles, size):
            first = min(start, self.num_tiles - size)
            begin, end = first * TILE, (first + size) * TILE
            gather = tuple(self.spans(begin, end, begin))
            scatter = tuple(self.spans(start * TILE, end, begin))
            chunks.append(Chunk(first, first + size, start - first, gather, scatter))
        return chunks


def pad(layout: ParameterLayout) -> PaddedLayout:
    """Pad the flat vector to whole groups and tiles."""
    starts: list[int] = []
    block_tiles: list[slice] = []
    position, block, first_tile = 0, 0, 0
    for spec in layout.specs:
        if spec.block != block:
            position = _round_up(position, TILE)
            block_tiles.append(slice(first_tile, position // TILE))
            first_tile, block = position // TILE, spec.block
        position = _round_up(position, GROUP)
        starts.append(position)
        position += spec.stop - spec.start
    block_tiles.append(slice(first_tile, _round_up(position, TILE) // TILE))
    return PaddedLayout(layout, tuple(starts), tuple(block_tiles))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
