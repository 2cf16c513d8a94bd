"""Passes over the candidates: each over the cores of the machine or on the device that directions
are kept on, with what processes that share the subspace sum over each other's columns.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from lightning_twa.machine import (
    all_ranks,
    from_rank_,
    in_order,
    rank,
    sum_over_ranks,
    world_size,
)
from lightning_twa.subspace.candidate_tiles import CandidateTiles
from lightning_twa.subspace.device_tiles import BUILDS, DeviceTiles
from lightning_twa.subspace.directions import Directions, Scratch

__all__ = ["LARGEST", "PARTS", "Passes"]

LARGEST = 2.0**100  # of a mixing in float32
PARTS = 64  # that processes with the same candidates can share

Found = TypeVar("Found")


class Passes:
    """Passes over the candidates.

    Tiles are summed up in :data:`PARTS` parts, and the parts in their order, so that the sums are
    the same whatever the number of processes that take some of the parts each.

    Args:
        tiles: Of them.
        threads: That take a tile each.
        tick: Called after each tile with its number of columns.
        carrier: Device whose backend carries what processes exchange.
        target: Device that directions are kept on, and built on where it can.
    """

    def __init__(
        self,
        tiles: CandidateTiles,
        threads: int,
        tick: Callable[[int], object] | None,
        carrier: torch.device,
        target: torch.device,
    ) -> None:
        self.tiles = tiles
        self.threads = threads
        self.tick = tick
        self.carrier = carrier
        self.device = target if target.type in BUILDS and not tiles.wider else None
        self.alone = tiles.columns is None  # the only process
        everywhere = tiles.columns is not None and tiles.columns.everywhere
        count = world_size() if everywhere else 1
        cuts = [part * len(tiles) // PARTS for part in range(PARTS + 1)]
        self.part_of = [part for part in range(PARTS) for _ in range(cuts[part], cuts[part + 1])]
        shares = [cuts[share * PARTS // count] for share in range(count + 1)]
        self.shares = [slice(*ends) for ends in itertools.pairwise(shares)]
        self.own = self.shares[rank() if everywhere else 0]
        own = range(len(tiles))[self.own]
        self.parts = [range(*ends) for ends in itertools.pairwise(cuts)]
        self.own_parts = [part for part in self.parts if part and part[0] in own]

    def _on_device(self, work: Callable[[DeviceTiles], Found]) -> Found | None:
        """What a device computes; ``None`` where it cannot, or has no room for that."""
        if self.device is None:
            return None
        try:
            return work(DeviceTiles(self.tiles, self.device, self.own_parts, self.tick))
        except RuntimeError as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError):
                warnings.warn(
                    f"The subspace could not be built on {self.device} ({error}), so it is built "
                    f"on the CPU, which takes longer.",
                    stacklevel=2,
                )
            self.device = None
            return None

    def _each(self, work: Callable[[int, Scratch], Found]) -> Iterator[tuple[int, Found]]:
        """What a function gives for each of this process's tiles with columns, in their order."""
        jobs = [tile for tile in range(len(self.tiles))[self.own] if self.tiles.spans[tile]]
        found = in_order(work, jobs, Scratch, min(self.threads, len(jobs)))
        for tile, result in zip(jobs, found, strict=True):
            yield tile, result
            if self.tick is not None:
                self.tick(self.tiles.size(tile))

    def _total(self, parts: Tensor, owners: Sequence[int], count: int) -> Tensor:
        """Sums of parts by their owners, over all processes.

        Args:
            parts: Of this process, zero where another one has them.
            owners: Of each part, in ``range(count)``.
            count: Number of owners.
        """
        divided = len(self.shares) > 1
        if divided:
            parts = sum_over_ranks(parts, self.carrier)  # with zeros: exact
        total = parts.new_zeros(count, *parts.shape[1:])
        for owner, part in zip(owners, parts, strict=True):
            total[owner] += part
        return total if self.alone or divided else sum_over_ranks(total, self.carrier)

    def moments(
        self, given: Tensor | None, together: Callable[[], AbstractContextManager[None]]
    ) -> tuple[Tensor, Tensor]:
        """``(B, n, n)`` products of the candidates, and ``(B,)`` squared norms of the center, over
        all columns; float64.

        Args:
            given: The center, flat, if it is not the mean.
            together: What may fail in one process is done in this.
        """
        tiles, n = self.tiles, len(self.tiles.members)
        key_of = list(zip(self.part_of, tiles.blocks, strict=True))
        keys = list(dict.fromkeys(key_of))
        at = {key: i for i, key in enumerate(keys)}
        gram = torch.zeros(len(keys), n, n, dtype=torch.float64, device="cpu")
        norm2 = torch.zeros(len(keys), dtype=torch.float64, device="cpu")

        def work(tile: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
            read = tiles.read(tile, scratch)
            squares = tiles.squares(tile, read.mean, given)
            return tiles.gram(tile, read.rows, scratch), squares

        places = [at[key] for key in key_of]
        with together():
            found = self._on_device(lambda there: there.moments(places, len(keys), given))
            if found is not None:
                gram, norm2 = found
            else:
                for tile, (products, squares) in self._each(work):
                    gram[places[tile]] += products
                    norm2[places[tile]] += squares
        blocks, count = [block for _, block in keys], tiles.layout.num_blocks
        return self._total(gram, blocks, count), self._total(norm2, blocks, count)

    def fill(
        self,
        make: Callable[[], Directions],
        mixing: Tensor,
        together: Callable[[], AbstractContextManager[None]],
        *,
        with_mean: bool,
    ) -> tuple[Directions, Tensor | None]:
        """The directions, closed, and the mean, flat, where that is asked for.

        Args:
            make: Gives empty directions.
            mixing: ``(B, k, n)`` float64.
            together: What may fail in one process is done in this.
            with_mean: Whether it is; else it takes no memory.
        """
        tiles, k = self.tiles, mixing.shape[1]
        narrow = mixing.float() if float(mixing.abs().max()) <= LARGEST else mixing
        squares = torch.zeros(PARTS, 2, dtype=torch.float64, device="cpu")
        with together():
            mean = None
            if with_mean:
                where = self.device or torch.device("cpu")
                mean = torch.empty(tiles.layout.numel, dtype=tiles.layout.dtype, device=where)
            stored = make()

            def work(tile: int, scratch: Scratch) -> Tensor:
                read = tiles.read(tile, scratch)
                if mean is not None:
                    tiles.put(tile, read.mean, mean)
                rows = read.rows if narrow.dtype == torch.float32 else read.rows.double()
                matrix = (narrow if rows.dtype == torch.float32 else mixing)[tiles.blocks[tile]]
                values = scratch.take("directions", (k, rows.shape[1]), rows.dtype)
                torch.mm(matrix, rows, out=values)
                return stored.write(tile, values, scratch)

            found = self._on_device(
                lambda there: there.fill(mixing, self.part_of, PARTS, stored, mean)
            )
            if found is not None:
                squares = found
            else:
                for tile, of_tile in self._each(work):
                    squares[self.part_of[tile]] += of_tile
        if len(self.shares) > 1:
            for source, share in enumerate(self.shares):
                of_mean = [] if mean is None else [mean[tiles.columns_of(share)]]
                from_rank_([*of_mean, *stored.pieces(share)], source, self.carrier)
        stored.close(self._total(squares, [0] * PARTS, 1)[0])
        if not self.alone:
            stored.prepare(lambda compiled: all_ranks(compiled, self.carrier))
        return stored, mean
