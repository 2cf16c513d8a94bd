"""Whether a tensor is still what a copy of it holds.

No counter tells: a tensor's version does not see writes through ``.data`` (momentum encoders are
written so), through memory shared with numpy, or in inference mode. So values are looked at. On the
host they are compared. A tensor on a device is not copied for that each time: a fingerprint of it
is remembered with the copy that it was found equal to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["all_same", "equal", "fingerprints", "same"]

HOSTS = {"cpu"}  # types of devices whose tensors are compared
SIDE = 1024  # columns that sums are taken over
ODD = -7046029254386353131  # 2**64 by the golden ratio, as a signed one: its multiples spread

_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # fingerprints by copy


def same(old: Tensor, new: Tensor) -> bool:
    """Whether a tensor on the CPU, which nobody changes, equals another on any device."""
    return all_same([old], [new])[0]


def all_same(olds: Sequence[Tensor], news: Sequence[Tensor]) -> list[bool]:
    """Of each pair what :func:`same` says; a device is waited for once.

    Args:
        olds: Tensors on the CPU, which nobody changes.
        news: As many, on any device.
    """
    pairs = [(old, new.detach()) for old, new in zip(olds, news, strict=True)]
    there = [
        i
        for i, (old, new) in enumerate(pairs)
        if new.device.type not in HOSTS and old.shape == new.shape and old.dtype == new.dtype
    ]
    prints = dict(zip(there, fingerprints([pairs[i][1] for i in there]), strict=True))
    found = []
    for i, (old, new) in enumerate(pairs):
        known = i in prints and old in _found and _found[old] == prints[i]
        found.append(known or equal(old, new.cpu()))
        if found[-1] and i in prints:
            _found[old] = prints[i]
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, or the same bits: a NaN in a frozen one does not vary."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    plain = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    if a.is_floating_point() and a.dtype.itemsize == 1:  # float8, which torch 2.4 cannot compare
        a, b = a.float(), b.float()
    return torch.equal(*plain) or torch.equal(a, b)


def fingerprints(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Two numbers of 64 bits from each tensor's bits, computed where it is, at memory speed. Those
    of two tensors of a shape and dtype that differ are the same by a chance that can be left out of
    account, unless somebody means them to be. A device is waited for once.

    Args:
        tensors: Of at most eight bytes an element.
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    found = [(0, 0)] * len(tensors)
    for members in by_device.values():
        values = torch.stack([_fingerprint(tensors[i]) for i in members]).cpu().tolist()
        for i, (first, second) in zip(members, values, strict=True):
            found[i] = (int(first), int(second))
    return found


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> Tensor:
    """``(2,)`` int64."""
    # No integers of 64 bits: their highest bit is the same in every odd multiple
    whole = {1: torch.uint8, 2: torch.int16}.get(tensor.itemsize, torch.int32)
    bits = tensor.contiguous().view(-1).view(whole)
    rows = bits.numel() // SIDE
    body, rest = bits[: rows * SIDE].view(rows, SIDE), bits[rows * SIDE :]
    # Of each sum every integer of 64 bits wraps around
    by_column, by_row = body.sum(0, dtype=torch.int64), body.sum(1, dtype=torch.int64)
    last = rest.to(torch.int64)
    first = (by_column * _weights(SIDE, bits)).sum() + (last * _weights(len(last), bits, 1)).sum()
    second = (by_row * _weights(rows, bits, 2)).sum() + (last * _weights(len(last), bits, 3)).sum()
    return torch.stack([first, second])


def _weights(n: int, like: Tensor, kind: int = 0) -> Tensor:
    """``(n,)`` odd integers of 64 bits."""
    place = torch.arange(1, n + 1, dtype=torch.int64, device=like.device) + kind * 2**32
    mixed = place * ODD
    mixed = (mixed ^ (mixed >> 29)) * ODD
    return (mixed ^ (mixed >> 31)) | 1
