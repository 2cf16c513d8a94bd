"""The state of an optimizer that rests, in main memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["RestingState"]

HOSTS = {"cpu"}  # types of devices from which nothing is moved


class RestingState:
    """Moves the tensors of optimizers' states to main memory, and back. The tensors stay the same
    objects, for whoever else knows them, and have the same bits on the same device afterwards.

    What stays where it is: numbers (the step counts of capturable and fused optimizers), tensors
    that share their memory with others, and those of a class of their own (parts of sharded ones,
    quantized ones).
    """

    def __init__(self) -> None:
        self._moved: list[tuple[Tensor, torch.device]] = []

    def put_away(self, optimizers: Iterable[Optimizer]) -> int:
        """Move what is on a device to main memory. May be called again.

        Returns:
            Bytes of tensors that stay on a device because of their class.
        """
        found = {id(t): t for o in optimizers for s in o.state.values() for t in _tensors(s)}
        self._moved = [(t, device) for t, device in self._moved if id(t) in found]
        owners: dict[tuple[str, int], int] = {}
        plain = [t for t in found.values() if type(t) is Tensor and t.layout == torch.strided]
        for tensor in plain:
            owners[_place(tensor)] = owners.get(_place(tensor), 0) + 1
        for tensor in plain:
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            away = tensor.device.type not in HOSTS and tensor.dim() > 0
            if away and whole and owners[_place(tensor)] == 1:
                self._moved = [(t, device) for t, device in self._moved if t is not tensor]
                self._moved.append((tensor, tensor.device))
                tensor.data = tensor.detach().to("cpu", copy=True)
        others = (t for t in found.values() if type(t) is not Tensor)
        return sum(t.nbytes for t in others if t.device.type not in HOSTS)

    def bring_back(self) -> None:
        """Move it back. May be called again, after an error too."""
        while self._moved:
            tensor, device = self._moved[-1]
            if tensor.device != device:
                tensor.data = tensor.detach().to(device)
            self._moved.pop()


def _place(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """In a state of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
