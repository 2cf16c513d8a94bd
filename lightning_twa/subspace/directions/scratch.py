"""Memory that is used again: to have the system clear some megabytes for each operation takes ten
times what the operation does.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Tensors by name, made once; for one thread.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with whatever is in it. The next call with its name and dtype takes it back.

        Args:
            name: What it is for.
            shape: Of it.
            dtype: Of it.
        """
        size = torch.Size(shape).numel()
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)
