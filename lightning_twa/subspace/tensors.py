"""Single tensors, whatever they are: sharded, sparse, not contiguous, or not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_finite",
    "copy_all",
    "flat_view",
    "in_float64",
    "is_accelerator",
    "local_gradient",
    "local_part",
    "own_part",
    "pieces",
    "to_dense",
    "to_shards",
    "widest",
    "without_autocast",
]


WITHOUT_FLOAT64 = {"mps"}  # types of devices: Apple's
HOSTS = {"cpu"}  # types of devices whose values can be read without waiting


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN or infinity.

    Args:
        tensor: Any floating-point tensor.
        what: How the error names it.

    Raises:
        ValueError: With the number of bad entries.
    """
    # A sum runs at memory speed, unlike isfinite; an overflow is told apart below.
    if tensor.numel() and not math.isfinite(tensor.sum().item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"{what} holds {bad} NaN or infinite value{'s' if bad > 1 else ''}: training has "
                f"diverged. Lower the learning rate, or clip gradients, before weights are "
                f"averaged."
            )


def flat_view(tensor: Tensor, like: Tensor | None = None) -> Tensor | None:
    """The tensor as a vector to write into, ``None`` where it has to be copied into.

    Args:
        tensor: Any tensor.
        like: What is to be written, where it may have another dtype or device.
    """
    same = like is None or (tensor.dtype == like.dtype and tensor.device == like.device)
    return tensor.view(-1) if same and tensor.is_contiguous() else None


def pieces(vector: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Views of a vector.

    Args:
        vector: The vector.
        starts: Where they begin, in order and not overlapping.
        sizes: Their elements.
    """
    cuts, position = [], 0
    for start, size in zip(starts, sizes, strict=True):
        cuts += [start - position, size]
        position = start + size
    cuts.append(vector.numel() - position)
    return list(torch.split(vector, cuts)[1::2])


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, of another dtype perhaps, in one operation; torch takes one
    for each pair that has not the same layout in memory.

    Args:
        targets: Tensors, written in place.
        sources: As many, of the same numbers of elements; of another shape only where one of both
            is contiguous.
    """
    into, what = [], []
    for target, source in zip(targets, sources, strict=True):
        if target.numel() == 0:
            continue
        if target.shape != source.shape and target.is_contiguous():
            target = target.view(source.shape)
        into.append(target)
        what.append(source.view(target.shape))
    if into:
        torch._foreach_copy_(into, what)


def to_dense(gradient: Tensor | None) -> Tensor | None:
    """A sparse gradient as a dense one; others as they are."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def is_accelerator(device: torch.device) -> bool:
    """Whether operations are expensive to begin and values to read, for the host runs ahead."""
    return device.type not in HOSTS


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a ``DTensor``, sharing its memory; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        part: Tensor = to_local()
    return part


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, where its device has that, else on the CPU."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).double()


def widest(device: torch.device) -> torch.dtype:
    """The dtype of coefficients on a device: float64 where it has that, else float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Have products in the dtype of their tensors, also where autocast is on."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of ``like``, a view; all of it where that
    is a plain tensor.

    Args:
        whole: The same on every process.
        like: Of its shape.
    """
    placements = getattr(like, "placements", None)
    if placements is None:
        return whole
    mesh = like.device_mesh  # type: ignore[attr-defined]
    shape, offset = _shape_and_offset()(whole.shape, mesh, placements)
    for dimension, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension]), size)
    return whole


def _shape_and_offset() -> Any:
    torch_2_4 = not hasattr(torch.distributed, "tensor")
    where = "torch.distributed._tensor" if torch_2_4 else "torch.distributed.tensor"
    return import_module(f"{where}._utils").compute_local_shape_and_global_offset


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this process holds of a parameter's gradient, in the parameter's own placements.

    With sequence parallelism each process has the gradient of its part of the batch (``Partial``)
    of a parameter that all of them have: these are summed here, so every process calls it.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    placements = getattr(parameter, "placements", None)
    if placements is not None and getattr(gradient, "placements", placements) != placements:
        with torch.no_grad():
            gradient = gradient.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local_part(gradient)


def to_shards(module: nn.Module) -> None:
    """Let FSDP2 give up gathered parameters, as they are after an evaluation: what is read and
    written are the shards. Other modules are not touched.
    """
    for part in module.modules():
        if callable(getattr(part, "unshard", None)):
            part.reshard()  # type: ignore[operator]
