"""Every collective of the package, called by every rank; no-ops without a process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "CommonError",
    "all_ranks",
    "from_rank_",
    "from_rank_zero",
    "from_rank_zero_",
    "gather_columns",
    "gather_objects",
    "in_common",
    "mean_over_ranks_",
    "rank",
    "reduce_scatter_mean",
    "sum_over_ranks",
    "world_size",
]


T = TypeVar("T")


class CommonError(RuntimeError):
    """An error of one rank that every rank raises."""


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
def sum_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over ranks, the same bits on every rank.

    Args:
        tensor: The same shape on every rank.
        device: Device whose backend carries it.

    Returns:
        The sum, on the tensor's device.
    """
    carried = tensor.to(device, copy=True)
    if world_size() > 1:
        dist.all_reduce(carried)
    return carried.to(tensor.device)


@torch.no_grad()
def from_rank_zero_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place.

    Args:
        tensors: The same number, shapes, dtypes and order on every rank.
    """
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def from_rank_zero(tensor: Tensor, device: torch.device) -> Tensor:
    """Rank 0's value of a tensor.

    Args:
        tensor: Contiguous; the same shape and dtype on every rank, on the CPU.
        device: Device whose backend carries it.

    Returns:
        The value, on the CPU.
    """
    carried = tensor.to(device, copy=True)
    from_rank_zero_([carried])
    return carried.to("cpu")


@torch.no_grad()
def from_rank_(tensors: Iterable[Tensor], source: int, device: torch.device) -> None:
    """Replace each tensor by one rank's bytes, in place.

    Args:
        tensors: The same number, shapes, dtypes and order on every rank; contiguous, anywhere.
        source: The rank.
        device: Device whose backend carries them.
    """
    for tensor in tensors:
        if tensor.numel():
            own = tensor.view(torch.uint8)  # no backend has every dtype
            carried = own.to(device)
            dist.broadcast(carried, src=source)
            if carried is not own:
                own.copy_(carried)


@torch.no_grad()
def reduce_scatter_mean(rows: Tensor, out: Tensor) -> None:
    """The mean over ranks of the row that belongs to this rank.

    Args:
        rows: ``(W, b)`` contiguous, a row for each rank; overwritten.
        out: ``(b,)`` this rank's row of the mean.
    """
    # The names of torch 2.13, and those before; the later ones warn.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, rows.view(-1))  # sum: gloo has no mean
    out /= rows.shape[0]


@torch.no_grad()
def gather_columns(columns: Tensor, out: Tensor) -> None:
    """Every rank's columns, on every rank.

    Args:
        columns: ``(b,)`` this rank's.
        out: ``(W, b)`` contiguous, a row for each rank.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), columns)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank; small picklable objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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


@contextmanager
def in_common(kind: type[Exception] = CommonError) -> Iterator[None]:
    """Let what one rank raises in the body be raised on every rank: none waits for one that has
    failed. The body has no collectives, or all before what may fail on one rank alone. One process
    alone raises what it raised.

    Args:
        kind: Of the error of several ranks, which says what the first of them raised.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        problem = error
    said = None if problem is None else f"{type(problem).__name__}: {problem}"
    for found in gather_objects(said):
        if found is not None:
            raise kind(found) from problem
