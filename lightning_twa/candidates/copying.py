"""Copies of many tensors in main memory, in few operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

__all__ = ["copies_on_host", "to_cpu", "to_host"]

unflatten: Any = _unflatten_dense_tensors  # views of a piece, as DDP makes them
PLAIN = (Tensor, nn.Parameter)
PINNING = {"cuda"}  # devices that copy into pinned memory without the host


def to_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the CPU, in another dtype if one is given."""
    return tensor.detach().to(
        device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )


@torch.no_grad()
def to_host(
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    *,
    look: bool = False,
    stay: bool = True,
) -> tuple[list[Tensor], bool]:
    """Contiguous copies on the CPU, those of one dtype in one piece of memory. A device is waited
    for once, and not for every tensor.

    Args:
        tensors: Dense ones.
        dtypes: What each is rounded to.
        look: Whether to find out if all are finite.
        stay: Whether the copies stay for long: they are then not in pinned memory.

    Returns:
        The copies, and whether all are finite: ``False`` also where their sum overflows, and where
        that was not asked for.
    """
    copies: list[Tensor] = list(tensors)
    groups: dict[tuple[torch.dtype, torch.device | None], list[int]] = {}
    sums: list[Tensor] = []
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if type(tensor) in PLAIN:
            # a device is slow to hash
            groups.setdefault((dtype, None if tensor.is_cpu else tensor.device), []).append(i)
        else:
            copies[i] = to_cpu(tensor, dtype)
            sums += [_sum(copies[i])] if look else []
    for (dtype, device), members in groups.items():
        held = [tensors[i] for i in members]
        pinned = device is not None and device.type in PINNING
        size = sum(tensor.numel() for tensor in held)
        piece = torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)
        parts: list[Tensor] = unflatten(piece, held)
        torch._foreach_copy_(parts, held, non_blocking=pinned)
        if pinned:
            torch.cuda.current_stream(device).synchronize()
        if pinned and stay:
            piece = piece.clone()
            parts = unflatten(piece, held)
        for i, part in zip(members, parts, strict=True):
            copies[i] = part
        sums += [_sum(piece)] if look else []
    return copies, look and all(math.isfinite(value.item()) for value in sums)


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory for a short time, by name: nothing more is on the device for them."""
    copies, _ = to_host([*tensors.values()], [t.dtype for t in tensors.values()], stay=False)
    return dict(zip(tensors, copies, strict=True))


def _sum(piece: Tensor) -> Tensor:
    """Which is not finite where something is not."""
    wide = piece.float() if piece.itemsize == 1 else piece
    return wide.sum(dtype=torch.float32 if wide.itemsize == 2 else None)
