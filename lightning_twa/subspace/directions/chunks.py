"""A model's tensors to and from a chunk of the padded vector: one after the other, or, where each
would be an operation that the host launches, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_twa.subspace.directions.tiles import Chunk
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import copy_all, flat_view, pieces

__all__ = ["Scatter", "gather"]


def gather(
    chunk: Chunk, gradients: Sequence[Tensor | None], buffer: Tensor, *, at_once: bool
) -> None:
    """Write gradients into a chunk's columns; those without one are left.

    Args:
        chunk: The chunk.
        gradients: One per tensor.
        buffer: The chunk's columns.
        at_once: Whether in one operation.
    """
    starts, sources = [], []
    for span in chunk.gather:
        gradient = gradients[span.tensor]
        if gradient is None:
            continue
        if gradient.numel() != span.source.stop - span.source.start:
            gradient = gradient.reshape(-1)[span.source]
        if not at_once:
            buffer[span.target] = gradient.reshape(-1)
        starts.append(span.target.start)
        sources.append(gradient)
    if at_once:
        copy_all(pieces(buffer, starts, [source.numel() for source in sources]), sources)


class Scatter:
    """Writes center and values into tensors, chunk by chunk.

    Args:
        layout: The flat vector.
        center: Flat.
        out: One tensor per tensor of the layout, of any dtype.
        at_once: Whether in two operations a chunk.
    """

    def __init__(
        self, layout: ParameterLayout, center: Tensor, out: Sequence[Tensor], *, at_once: bool
    ) -> None:
        self._layout = layout
        self._center = center
        self._out = out
        self._at_once = at_once
        # tensors that cannot be written flat, until all of one is there
        self._staged: dict[int, Tensor] = {}

    def write(self, chunk: Chunk, values: Tensor) -> None:
        """Write a chunk's values; they may be overwritten."""
        if self._at_once:
            self._write_at_once(chunk, values)
            return
        center = self._center
        for span in chunk.scatter:
            spec, target = self._layout.specs[span.tensor], self._out[span.tensor]
            flat = flat_view(target, center)
            if flat is None:
                flat = self._stage(span.tensor)
            columns = slice(spec.start + span.source.start, spec.start + span.source.stop)
            torch.add(center[columns], values[span.target], out=flat[span.source])
            if columns.stop == spec.stop and span.tensor in self._staged:
                target.copy_(self._staged.pop(span.tensor).view(spec.shape))

    def _stage(self, tensor: int) -> Tensor:
        if tensor not in self._staged:
            self._staged[tensor] = self._center.new_empty(self._out[tensor].numel())
        return self._staged[tensor]

    def _write_at_once(self, chunk: Chunk, values: Tensor) -> None:
        starts = [span.target.start for span in chunk.scatter]
        sizes = [span.source.stop - span.source.start for span in chunk.scatter]
        columns = [
            self._layout.specs[span.tensor].start + span.source.start for span in chunk.scatter
        ]
        theta = pieces(values, starts, sizes)
        torch._foreach_add_(theta, pieces(self._center, columns, sizes))
        targets, sources = [], []
        for span, part in zip(chunk.scatter, theta, strict=True):
            target = self._out[span.tensor]
            if part.numel() == target.numel():
                targets.append(target)
                sources.append(part)
            elif target.is_contiguous():
                targets.append(target.view(-1)[span.source])
                sources.append(part)
            else:
                self._stage(span.tensor)[span.source] = part
                if span.source.stop == target.numel():
                    targets.append(target)
                    sources.append(self._staged.pop(span.tensor))
        copy_all(targets, sources)
