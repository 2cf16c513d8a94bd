"""The passes over the candidates on a device, many tiles at a time: operations are expensive to
begin there, and candidates wait in main memory.

The host copies tiles into pinned memory while the device works on those before, and waits for it
only until it has taken what that memory held. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_twa.machine import free_bytes
from lightning_twa.subspace.candidate_tiles import CandidateTiles
from lightning_twa.subspace.directions import TILE, Directions, Scratch, Span
from lightning_twa.subspace.tensors import without_autocast

__all__ = ["BUILDS", "DeviceTiles"]

BUILDS = {"cuda"}  # types of devices that subspaces are built on
BYTES = 1 << 28  # to work in, of which no more than a quarter of what is free is taken
PER_COLUMN = 56  # bytes to work in for each candidate

Tick = Callable[[int], object] | None


class Stretch:
    """Consecutive tiles on the device.

    Args:
        tiles: Their indices.
        mean: ``(tiles, TILE)`` float64.
        rows: ``(tiles, n, TILE)`` float64, 0 in padding; less their mean unless they were read as
            they are.
    """

    def __init__(self, tiles: range, mean: Tensor, rows: Tensor) -> None:
        self.tiles = tiles
        self.mean = mean
        self.rows = rows


class DeviceTiles:
    """What a device does with the candidates that this process holds.

    Args:
        tiles: Of them.
        device: Where that is.
        own: Those of the tiles that are read, in parts: what is summed up of one does not depend on
            the others.
        tick: Called after each stretch of them with its number of columns.
        width: Tiles in a stretch; as many as there is room for if not given.

    Raises:
        torch.cuda.OutOfMemoryError: Where the device has no room, as methods do too.
    """

    def __init__(
        self,
        tiles: CandidateTiles,
        device: torch.device,
        own: Sequence[range],
        tick: Tick = None,
        width: int | None = None,
    ) -> None:
        self.tiles = tiles
        self.device = device
        self.own = own
        self.tick = tick
        self.layout = tiles.layout
        self.n = len(tiles.members)
        if width is None:
            free = free_bytes(device)
            room = BYTES if free is None else min(BYTES, free // 4)
            width = room // (PER_COLUMN * self.n * TILE)
        self.width = max(min(width, max((len(part) for part in own), default=0)), 1)
        self.scratch = Scratch(device)
        size = self.n * self.width * TILE
        self._staging = [_Staging(size, self.layout.dtype, device) for _ in range(2)]

    def moments(
        self, keys: Sequence[int], count: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Products of the candidates, ``(count, n, n)``, and squared norms of the center,
        ``(count,)``, over the columns that count here, by keys of the tiles; float64 on the CPU.

        Args:
            keys: Of each tile, in ``range(count)``.
            count: Number of keys.
            center: Of what is held here, flat; the mean if not given.
        """
        center = None if center is None else center.to(self.device)
        gram = torch.zeros(count, self.n, self.n, dtype=torch.float64, device=self.device)
        norm2 = torch.zeros(count, dtype=torch.float64, device=self.device)
        with without_autocast(self.device):
            for stretch in self._read():
                squares = self._norms(stretch, center)
                products = stretch.rows @ stretch.rows.mT
                for i, tile in enumerate(stretch.tiles):  # the same sums, whatever the width
                    gram[keys[tile]].add_(products[i])
                    norm2[keys[tile]].add_(squares[i])
        return gram.cpu(), norm2.cpu()

    def fill(
        self, mixing: Tensor, keys: Sequence[int], count: int, into: Directions, mean: Tensor | None
    ) -> Tensor:
        """Write directions and the mean.

        Args:
            mixing: ``(B, k, n)`` float64.
            keys: Of each tile, in ``range(count)``.
            count: Number of keys.
            into: Directions on the device.
            mean: Of what is held here, flat, on the device; ``None`` where nobody asks for it.

        Returns:
            ``(count, 2)`` float64 on the CPU: see :meth:`Directions.write`.
        """
        mixing = mixing.to(self.device)
        squares = torch.zeros(count, 2, dtype=torch.float64, device=self.device)
        with without_autocast(self.device):
            for stretch in self._read():
                if mean is not None:
                    for i, span in self._spans(stretch.tiles):
                        mean[self._columns(span)] = stretch.mean[i, span.target]
                blocks = [self.tiles.blocks[tile] for tile in stretch.tiles]
                if len(set(blocks)) == 1:
                    chosen = mixing[blocks[0]].expand(len(blocks), -1, -1)
                else:
                    chosen = torch.stack([mixing[block] for block in blocks])
                values = chosen @ stretch.rows
                found = into.write_tiles(stretch.tiles.start, values, self.scratch)
                for i, tile in enumerate(stretch.tiles):
                    squares[keys[tile]].add_(found[i])
        return squares.cpu()

    def _read(self) -> Iterator[Stretch]:
        """Stretches, each of which is good until the next one.

        Raises:
            ValueError: At the end, naming a candidate and a tensor that is not finite.
        """
        read: list[range] = []
        finite: list[Tensor] = []
        for tiles in (part[i : i + self.width] for part in self.own for i in self._starts(part)):
            rows = self._rows(tiles, self._staging[len(read) % 2])
            mean = rows.sum(dim=1).div_(self.n)
            read.append(tiles)
            finite.append(torch.isfinite(mean).all())
            # Of a column with one value everywhere that value
            mean = torch.where((rows == rows[:, :1]).all(dim=1), rows[:, 0], mean)
            if self.tiles.centered:
                rows.sub_(mean.unsqueeze(1))
            yield Stretch(tiles, mean, rows)
            if self.tick is not None:
                self.tick(sum(self.tiles.size(tile) for tile in tiles))
        for tiles, good in zip(
            read, torch.stack(finite).cpu().tolist() if read else (), strict=True
        ):
            for tile in () if good else tiles:
                self.tiles.refuse(self.tiles.spans[tile])

    def _starts(self, part: range) -> range:
        return range(0, len(part), self.width)

    def _rows(self, tiles: range, staging: _Staging) -> Tensor:
        """``(tiles, n, TILE)`` float64 of the candidates."""
        width = len(tiles) * TILE
        staged = staging.begin(self.n * width).view(self.n, width)
        position = 0
        for i, span in self._spans(tiles):
            columns = slice(i * TILE + span.target.start, i * TILE + span.target.stop)
            staged[:, position : columns.start].zero_()
            position = columns.stop
            sources = [values[span.source] for values in self.tiles.tensor(span.tensor)]
            torch._foreach_copy_(staged[:, columns].unbind(0), sources)
        staged[:, position:].zero_()
        there = self.scratch.take("staged", (self.n, width), self.layout.dtype)
        staging.send(staged, there)
        rows = self.scratch.take("candidates", (len(tiles), self.n, TILE), torch.float64)
        return rows.copy_(there.view(self.n, len(tiles), TILE).transpose(0, 1))

    def _norms(self, stretch: Stretch, center: Tensor | None) -> Tensor:
        """``(tiles,)`` float64 squared norms of the center over the columns that count here; the
        rows lose the others.
        """
        values = stretch.mean.to(self.layout.dtype)
        for i, span in self._spans(stretch.tiles):
            if not self.tiles.counts(span):
                values[i, span.target] = 0.0
                stretch.rows[i, :, span.target] = 0.0
            elif center is not None:
                values[i, span.target] = center[self._columns(span)]
        return values.double().square().sum(dim=1)

    def _spans(self, tiles: range) -> Iterator[tuple[int, Span]]:
        for i, tile in enumerate(tiles):
            for span in self.tiles.spans[tile]:
                yield i, span

    def _columns(self, span: Span) -> slice:
        first = self.layout.specs[span.tensor].start
        return slice(first + span.source.start, first + span.source.stop)


class _Staging:
    """Memory of the host that a device takes numbers from.

    Args:
        size: How many at most.
        dtype: Of them.
        device: The device.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        try:
            self._held = torch.empty(size, dtype=dtype, device="cpu", pin_memory=self._pinned)
        except RuntimeError:  # the system has no more of it
            self._pinned = False
            self._held = torch.empty(size, dtype=dtype, device="cpu")
        self._taken: Any = None

    def begin(self, size: int) -> Tensor:
        """Room for so many numbers, once the device has taken what was in it."""
        if self._taken is not None:
            self._taken.synchronize()
        return self._held[:size]

    def send(self, held: Tensor, there: Tensor) -> None:
        """Copy what is in it, for operations of the device that follow."""
        there.copy_(held, non_blocking=self._pinned)
        if self._pinned:
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._taken.record(torch.cuda.current_stream(there.device))
