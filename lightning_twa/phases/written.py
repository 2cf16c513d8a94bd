"""Whether the model still has the weights that a phase has put into it before its first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_twa.machine import all_ranks
from lightning_twa.subspace import SubspaceOptimizer, local_part

__all__ = ["WrittenWeights"]


class WrittenWeights:
    """A copy of them, where comparing is faster than writing them again: on the CPU, of directions
    that are decoded on the way. Elsewhere nobody knows.

    Args:
        optimizer: Of the phase, which has written them.
        device: Whose backend carries messages.
    """

    def __init__(self, optimizer: SubspaceOptimizer, device: torch.device) -> None:
        self._device = device
        self._parameters = [local_part(p) for p in optimizer.param_groups[0]["params"]]
        self._copies: list[Tensor] = []
        subspace = optimizer.subspace
        here = all(p.device.type == "cpu" for p in self._parameters)
        if here and subspace.config.bits <= 8:
            self._copies = [p.detach().clone() for p in self._parameters]

    def stay(self) -> bool:
        """Whether every process's parameters are as they were, bit by bit; all processes ask."""
        pairs = zip(self._copies, self._parameters, strict=False)
        kept = bool(self._copies) and all(_same_bits(copy, now) for copy, now in pairs)
        return all_ranks(kept, self._device)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike for :func:`torch.equal`, of zeros with different signs they are not."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(a.itemsize, torch.int64)
    return torch.equal(*(t.detach().reshape(-1).view(whole) for t in (a, b)))
