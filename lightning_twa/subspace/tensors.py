"""Single tensors, whatever they are: sharded, sparse, not contiguous, or not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["check_finite", "flat_view", "local_part", "to_dense", "to_shards"]


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


def to_dense(gradient: Tensor | None) -> Tensor | None:
    """A sparse gradient as a dense one; others as they are."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a ``DTensor``, sharing its memory; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        part: Tensor = to_local()
    return part


def to_shards(module: nn.Module) -> None:
    """Let FSDP2 give up gathered parameters, as they are after an evaluation: what is read and
    written are the shards. Other modules are not touched.
    """
    for part in module.modules():
        if callable(getattr(part, "unshard", None)):
            part.reshard()  # type: ignore[operator]
