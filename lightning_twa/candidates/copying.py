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
LARGE = 2**16  # elements of a tensor that has memory of its own
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
    """Contiguous copies on the CPU, small ones of one dtype in one piece of memory. A device is
    waited for once, and not for every tensor.

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
    small: dict[tuple[torch.dtype, torch.device | None], list[int]] = {}
    pieces: list[list[int]] = []
    sums: list[Tensor] = []
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if type(tensor) not in PLAIN or not tensor.numel():
            copies[i] = to_cpu(tensor, dtype)
            sums += [_sum(copies[i])] if look else []
        elif tensor.numel() >= LARGE:
            pieces.append([i])
        else:  # a device is slow to hash
            small.setdefault((dtype, None if tensor.is_cpu else tensor.device), []).append(i)
    made: list[tuple[Tensor, list[int]]] = []  # in pinned memory
    waiting: set[torch.device] = set()
    for members in (*pieces, *small.values()):
        held = [tensors[i] for i in members]
        size, dtype = sum(tensor.numel() for tensor in held), dtypes[members[0]]
        pinned = not held[0].is_cpu and held[0].device.type in PINNING
        piece = _pinned(size, dtype) if pinned else torch.empty(size, dtype=dtype, device="cpu")
        parts: list[Tensor] = unflatten(piece, held)
        torch._foreach_copy_(parts, held, non_blocking=pinned)
        for i, part in zip(members, parts, strict=True):
            copies[i] = part
        if pinned:
            waiting.add(held[0].device)
            made.append((piece, members))
        elif look:  # while it is in the cache
            sums.append(_sum(piece))
    for device in waiting:
        torch.cuda.current_stream(device).synchronize()
    for piece, members in made if stay else ():
        parts = unflatten(piece.clone(), [copies[i] for i in members])
        for i, part in zip(members, parts, strict=True):
            copies[i] = part
    sums += [_sum(piece) for piece, _ in made] if look else []
    return copies, look and all(math.isfinite(value.item()) for value in sums)


def _pinned(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that a device can write to, or any other where the system has no more of it."""
    try:
        return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=dtype, device="cpu")


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory for a short time, by name: nothing more is on the device for them."""
    copies, _ = to_host([*tensors.values()], [t.dtype for t in tensors.values()], stay=False)
    return dict(zip(tensors, copies, strict=True))


def _sum(piece: Tensor) -> Tensor:
    """Which is not finite where something is not."""
    wide = piece.float() if piece.itemsize == 1 else piece
    return wide.sum(dtype=torch.float32 if wide.itemsize == 2 else None)
