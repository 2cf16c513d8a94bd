"""Models and stores whose candidates a simulated device sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.simulated import DEVICE, There
from lightning_twa import StorageConfig
from lightning_twa.candidates import Candidate, Store

KINDS = pytest.mark.parametrize("kind", ["memory", "disk"])


class Late:
    """Instead of a thread: does the work when somebody waits for it."""

    def __init__(self, work: Any) -> None:
        self.work: Any = work

    def wait(self) -> tuple[Any, Exception | None]:
        try:
            return self.work(), None
        except Exception as error:
            return None, error


LATE = pytest.mark.parametrize("device", ["late"], indirect=True)


class Net(nn.Module):
    """Large and small tensors, in two dtypes, and buffers."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        shapes = {"large": (300, 301), "small": (7, 3), "bias": (5,), "none": (0, 2)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape).to(DEVICE)))
        self.low = nn.Parameter(torch.randn(9, 4).to(torch.bfloat16).to(DEVICE))
        self.small.requires_grad_(not frozen)
        self.register_buffer("mean", torch.randn(5).to(DEVICE))
        self.register_buffer("count", torch.tensor(3).to(DEVICE))
        self.register_buffer("host", torch.randn(2))

    def values(self) -> dict[str, Tensor]:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {k: (t.held if isinstance(t, There) else t).detach().clone() for k, t in own.items()}


@torch.no_grad()
def step(net: Net, store: Store, times: int = 1) -> None:
    """Training goes on: whatever the device has not taken is gone."""
    for _ in range(times):
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        net.mean.add_(1.0)
        net.count.add_(1)
        net.host.add_(1.0)
        store.pending.arrive(after_steps=True)


def made(kind: str = "memory", root: Path | None = None, **config: Any) -> Store:
    return Store(StorageConfig(kind=kind, **config), root=root, device=DEVICE)


def check(candidate: Candidate, expected: dict[str, Tensor], dtype: Any = None) -> None:
    assert candidate.tensors.keys() == expected.keys()
    for name, tensor in candidate.tensors.items():
        assert type(tensor) is Tensor
        wanted = expected[name]
        if dtype is not None and name in candidate.parameters:
            wanted = wanted.to(dtype)
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name
