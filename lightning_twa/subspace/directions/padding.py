"""What the groups that tensors end in are padded with: copies of their entries, so that padding
does not pull a group's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lightning_twa.subspace.directions.codec import GROUP
from lightning_twa.subspace.directions.tiles import TILE, Span

__all__ = ["fill_group", "pad_groups"]


def fill_group(values: Tensor, stop: int) -> None:
    """Pad the group that a tensor ends in.

    Args:
        values: ``(k, columns)``.
        stop: Where the tensor ends, which is not the end of a group.
    """
    padding = range(stop, -(-stop // GROUP) * GROUP)
    values[:, padding.start : padding.stop] = values[:, _copied(stop)]


def pad_groups(values: Tensor, spans: Sequence[Sequence[Span]]) -> Tensor | None:
    """Pad all groups that tensors end in, of tiles at once.

    Args:
        values: ``(tiles, k, TILE)``.
        spans: Of each tile the tensors' parts in it.

    Returns:
        ``(tiles, TILE)`` bool, which columns are not padding; ``None`` where all are.
    """
    if all(sum(s.target.stop - s.target.start for s in held) == TILE for held in spans):
        return None
    real = torch.zeros(len(spans), TILE, dtype=torch.bool, device="cpu")
    tiles: list[int] = []
    columns: list[int] = []
    sources: list[int] = []
    for tile, held in enumerate(spans):
        for span in held:
            real[tile, span.target] = True
            padding = range(span.target.stop, -(-span.target.stop // GROUP) * GROUP)
            tiles += [tile] * len(padding)
            columns += padding
            sources += _copied(span.target.stop) if padding else []
    if tiles:
        index = _sent(torch.tensor([tiles, columns, sources], device="cpu"), values.device)
        values[index[0], :, index[1]] = values[index[0], :, index[2]]
    return _sent(real, values.device)


def _copied(stop: int) -> list[int]:
    """The columns that the padding behind a tensor's end has copies of."""
    first = (stop - 1) // GROUP * GROUP
    return [first + i % (stop - first) for i in range(first + GROUP - stop)]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device, which the host does not wait for."""
    if device.type != "cuda":
        return tensor.to(device)
    with suppress(RuntimeError):  # the system has no more of that memory
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
