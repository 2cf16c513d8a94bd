"""Whether a tensor is still what a copy of it holds.

No counter tells: a tensor's version does not see writes through ``.data`` (momentum encoders are
written so), through memory shared with numpy, or in inference mode. So values are looked at. On the
host they are compared. A tensor on a device is not copied for that each time: a fingerprint of it
is remembered with the copy that it was found equal to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["equal", "fingerprint", "same"]

HOSTS = {"cpu"}  # types of devices whose tensors are compared
SIDE = 1024  # columns that sums are taken over
ODD = -7046029254386353131  # 2**64 by the golden ratio, as a signed one: its multiples spread

_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # fingerprints by copy


def same(old: Tensor, new: Tensor) -> bool:
    """Whether a tensor on the CPU, which nobody changes, equals another on any device."""
    new = new.detach()
    if new.device.type in HOSTS or old.shape != new.shape or old.dtype != new.dtype:
        return equal(old, new.cpu())
    now = fingerprint(new)
    if old not in _found or _found[old] != now:
        if not equal(old, new.cpu()):
            return False
        _found[old] = now
    return True


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, or the same bits: a NaN in a frozen one does not vary."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    plain = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    if a.is_floating_point() and a.dtype.itemsize == 1:  # float8, which torch 2.4 cannot compare
        a, b = a.float(), b.float()
    return torch.equal(*plain) or torch.equal(a, b)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two numbers of 64 bits from a tensor's bits, computed where it is, at memory speed. Those of
    two tensors of a shape and dtype that differ are the same by a chance that can be left out of
    account, unless somebody means them to be.

    Args:
        tensor: Of at most eight bytes an element.
    """
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
    values = torch.stack([first, second]).tolist()
    return int(values[0]), int(values[1])


def _weights(n: int, like: Tensor, kind: int = 0) -> Tensor:
    """``(n,)`` odd integers of 64 bits."""
    place = torch.arange(1, n + 1, dtype=torch.int64, device=like.device) + kind * 2**32
    mixed = place * ODD
    mixed = (mixed ^ (mixed >> 29)) * ODD
    return (mixed ^ (mixed >> 31)) | 1
