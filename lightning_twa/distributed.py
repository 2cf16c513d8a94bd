"""Every collective of the package, called by every rank; no-ops without a process group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_ranks", "mean_over_ranks", "mean_over_ranks_", "world_size"]


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def mean_over_ranks_(tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over ranks, in place.

    Args:
        tensors: The same number, shapes and order on every rank.
    """
    size = world_size()
    if size == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)  # sum: gloo has no mean
        tensor /= size


@torch.no_grad()
def mean_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """The mean of a tensor over ranks, the same bits on every rank.

    Args:
        tensor: The same shape on every rank, on the CPU.
        device: Device whose backend carries it.

    Returns:
        The mean, on the CPU.
    """
    carried = tensor.to(device, copy=True)
    mean_over_ranks_([carried])
    return carried.to("cpu")


def all_ranks(value: bool, device: torch.device) -> bool:
    """Whether ``value`` is true on every rank.

    Args:
        value: This rank's answer.
        device: Device whose backend carries the message.
    """
    if world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
