"""Tensors to and from stretches of one vector, all at once: on an accelerator a copy of each tensor
would be an operation of its own, and models have hundreds of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["copy_all", "pieces"]


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
