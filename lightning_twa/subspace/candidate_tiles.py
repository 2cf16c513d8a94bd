"""The candidates, read a tile of columns at a time, and what a tile gives: its part of center and
Gram matrix, and its directions.

Candidates are centered in float64, at their mean. Products of what remains are in float32, summed
up in float64: centered there is nothing left that cancels, so they are as exact as differences of
weights that are themselves float32. A tile is one thread's work, in memory that is used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from lightning_twa.subspace.columns import Columns
from lightning_twa.subspace.directions import GROUP, Scratch, Span, pad
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import check_finite

__all__ = ["PANEL", "CandidateTiles", "Tile"]

PANEL = 1 << 11  # columns that are summed up in float32
# Magnitudes whose squares float32 can add up; a tile that has none of these is left in float64
SMALLEST, LARGEST = 2.0**-40, 2.0**60
KEPT = 4  # tensors whose flat forms are kept; those that are not contiguous are copies


class Tile:
    """Columns of all candidates, centered, in a thread's scratch memory.

    Args:
        mean: ``(columns,)`` float64.
        rows: ``(n, columns)`` float32 or float64, 0 between tensors; less their mean unless they
            were read as they are.
    """

    def __init__(self, mean: Tensor, rows: Tensor) -> None:
        self.mean = mean
        self.rows = rows


class CandidateTiles:
    """What this process holds of the candidates, by tiles of the padded vector.

    Args:
        whole: The layout of the whole model.
        members: The candidates.
        columns: What is held here; ``None`` for everything.
        centered: Whether rows are less their mean.
        narrow: Whether products are in float32, where the numbers allow that.
    """

    def __init__(
        self,
        whole: ParameterLayout,
        members: Sequence[Mapping[str, Tensor]],
        columns: Columns | None,
        *,
        centered: bool,
        narrow: bool,
    ) -> None:
        self.layout = whole if columns is None else columns.local
        self.members = members
        self.columns = columns
        self.centered = centered
        self.narrow = narrow
        padded = pad(self.layout)
        self.spans = padded.spans_of_tiles()
        self.blocks = padded.block_of_tile
        self._flat: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._lock = Lock()

    @property
    def wider(self) -> bool:
        """Whether a candidate is in a wider dtype than the layout's, which is the first one's."""
        names = [spec.name for spec in self.layout.specs]
        sizes = [member[name].dtype.itemsize for member in self.members for name in names]
        return max(sizes, default=0) > self.layout.dtype.itemsize

    def __len__(self) -> int:
        return len(self.spans)

    def size(self, tile: int) -> int:
        """Its columns, without padding."""
        return sum(span.target.stop - span.target.start for span in self.spans[tile])

    def columns_of(self, tiles: slice) -> slice:
        """Of the flat vector of what is held here, those that tiles have."""
        spans = [span for tile in self.spans[tiles] for span in tile]
        if not spans:
            return slice(0, 0)
        first, last = (self.layout.specs[span.tensor].start for span in (spans[0], spans[-1]))
        return slice(first + spans[0].source.start, last + spans[-1].source.stop)

    def read(self, tile: int, scratch: Scratch) -> Tile:
        """Read a tile.

        Args:
            tile: Its index; of one with columns.
            scratch: Memory of this thread.

        Raises:
            ValueError: Naming the candidate and the tensor that is not finite.
        """
        spans, n = self.spans[tile], len(self.members)
        width = -(-spans[-1].target.stop // GROUP) * GROUP
        wide = scratch.take("candidates", (n, width), torch.float64)
        position = 0
        for span in spans:
            wide[:, position : span.target.start].zero_()
            position = span.target.stop
            flat = self.tensor(span.tensor)
            target = wide[:, span.target].unbind(0)
            torch._foreach_copy_(target, [values[span.source] for values in flat])
        wide[:, position:].zero_()
        mean = wide.mean(dim=0)
        if not bool(torch.isfinite(mean).all()):
            self.refuse(spans)
        if self.layout.dtype == torch.float64:  # narrower ones are summed up without rounding
            # Of a column with one value everywhere that value
            mean = torch.where((wide == wide[0]).all(dim=0), wide[0], mean)
        if self.centered:
            # In float64, not at the stored center: its rounding would be a direction of its own
            # where candidates lie close together, and is not part of the averaging weights.
            wide.sub_(mean)
        return Tile(mean, self._narrowed(wide, scratch) if self.narrow else wide)

    def put(self, tile: int, values: Tensor, flat: Tensor) -> None:
        """Write a tile's values into the flat vector of what is held here."""
        for span in self.spans[tile]:
            first = self.layout.specs[span.tensor].start
            flat[first + span.source.start : first + span.source.stop] = values[span.target]

    def squares(self, tile: int, mean: Tensor, flat: Tensor | None) -> Tensor:
        """Squared norm of a tile's part of the center, float64, of the columns that count here.

        Args:
            tile: Its index.
            mean: What the center is where ``flat`` is not given.
            flat: The center of what is held here.
        """
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for span in self.spans[tile]:
            if not self.counts(span):
                continue
            values = mean[span.target].to(self.layout.dtype)
            if flat is not None:
                first = self.layout.specs[span.tensor].start
                values = flat[first + span.source.start : first + span.source.stop]
            total += values.double().square().sum()
        return total

    def counts(self, span: Span) -> bool:
        """Whether a tensor's part counts here; a tile that one process reads for all counts."""
        held = self.columns
        return held is None or held.everywhere or held.counted[span.tensor]

    def gram(self, tile: int, rows: Tensor, scratch: Scratch) -> Tensor:
        """``(n, n)`` float64 products of a tile's rows over the columns that count here; the rows
        lose those that do not.
        """
        for span in self.spans[tile]:
            if not self.counts(span):
                rows[:, span.target].zero_()
        if rows.dtype == torch.float64:
            return rows @ rows.T
        panels, rest = divmod(rows.shape[1], PANEL)
        result = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
        if panels:
            cut = rows[:, : panels * PANEL].view(len(rows), panels, PANEL).transpose(0, 1)
            products = scratch.take("products", (panels, *result.shape), rows.dtype)
            result += torch.bmm(cut, cut.transpose(1, 2), out=products).sum(0, dtype=result.dtype)
        if rest:
            last = rows[:, panels * PANEL :]
            result += last @ last.T
        return result

    def _narrowed(self, wide: Tensor, scratch: Scratch) -> Tensor:
        """The rows in float32, where products of them can be."""
        low, high = wide.aminmax()
        if not SMALLEST <= max(-low.item(), high.item()) <= LARGEST:
            return wide
        return scratch.take("narrow", tuple(wide.shape), torch.float32).copy_(wide)

    def tensor(self, tensor: int) -> list[Tensor]:
        """What is held here of a tensor of each candidate, flat."""
        with self._lock:
            if tensor not in self._flat:
                name = self.layout.specs[tensor].name
                flat = [member[name].detach().reshape(-1) for member in self.members]
                if self.columns is not None:
                    flat = [self.columns.pick(tensor, values) for values in flat]
                self._flat[tensor] = flat
            self._flat.move_to_end(tensor)
            found = self._flat[tensor]
            while len(self._flat) > KEPT:
                self._flat.popitem(last=False)
            return found

    def refuse(self, spans: Sequence[Span]) -> None:
        """Raise for what is not finite in a tile's tensors; a sum of float64 may overflow too."""
        for span in spans:
            name = self.layout.specs[span.tensor].name
            for i, member in enumerate(self.members):
                check_finite(member[name], f"Candidate {i}, tensor {name!r},")
