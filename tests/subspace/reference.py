"""Candidates and models for the tests, and plain float64 versions of the formulas, written without
the package's code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CPU = torch.device("cpu")
BASES = pytest.mark.parametrize("name", ["pca", "candidates", "orthonormal"])
BLOCKS = pytest.mark.parametrize("blocks", ["global", "tensor", 30])
SOLVERS: dict[str, dict[str, Any]] = {
    "default": {},
    "full matrix, decay": {"weight_decay": 0.1, "betas": (0.8, 0.99), "schedule": "linear"},
    "full matrix, lr": {"lr": 0.05, "schedule": "step"},
    "adamw": {"name": "adamw"},
    "adamw, lr": {"name": "adamw", "lr": 0.05, "weight_decay": 0.1, "schedule": "constant"},
    "sgd": {"name": "sgd", "lr": 0.2, "momentum": 0.8, "weight_decay": 0.01},
}

# --- candidates, gradients, models


def members(n: int = 5, dtype: torch.dtype = F64) -> list[dict[str, Tensor]]:
    """Candidates around a common point, as training gives them."""
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "scale": (), "none": (0,), "b.weight": (3, 7)}
    start = {k: torch.randn(s, dtype=dtype) for k, s in shapes.items()}
    return [{k: v + 0.1 * torch.randn_like(v) for k, v in start.items()} for _ in range(n)]


# Blocks that are not multiples of a tile or group, smaller than both, empty, and of no dimension.
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (300, 70),
    "b": (5,),
    "scalar": (),
    "empty": (0, 3),
    "conv": (64, 3, 3, 3),
    "large": (130, 100),
}


def candidates(n: int = 6, dtype: torch.dtype = torch.float32, shapes: Any = None) -> list[Any]:
    shapes = SHAPES if shapes is None else shapes
    return [{k: torch.randn(s, dtype=dtype) for k, s in shapes.items()} for _ in range(n)]


# For processes that share columns: cut inside tensors, between them, and through one that is a
# whole number of tiles (of 8192 columns).
SHARED_SHAPES: dict[str, tuple[int, ...]] = {
    "a": (130, 100),
    "bias": (7,),
    "scalar": (),
    "empty": (0, 3),
    "tiles": (2, 8192),
    "conv": (64, 3, 3, 3),
    "large": (150, 121),
}


def seeded(seed: int, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """The same tensors in every process."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHARED_SHAPES if shapes is None else shapes
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net_members(n: int = 5) -> tuple[Net, list[dict[str, Tensor]]]:
    net = Net()
    named = list(net.named_parameters())
    return net, [{k: p.detach() + 0.2 * torch.randn_like(p) for k, p in named} for _ in range(n)]


class Quadratic(nn.Module):
    """A loss whose minimum is a known average of the candidates."""

    def __init__(self, ms: list[dict[str, Tensor]], beta: Tensor) -> None:
        super().__init__()
        self.names = list(ms[0])
        for i, name in enumerate(self.names):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros_like(ms[0][name])))
        self.target = {n: sum(b * m[n] for b, m in zip(beta, ms, strict=True)) for n in ms[0]}

    def loss(self) -> Tensor:
        pairs = zip(self.parameters(), self.target.values(), strict=True)
        return sum((p - t).square().sum() for p, t in pairs)


# --- formulas


def flatten(tensors: dict[str, Tensor]) -> np.ndarray:
    """One float64 vector."""
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors.values()])


def factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """Learning-rate factor."""
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 1.0 if step < total / 2 else 0.1 if step < 3 * total / 4 else 0.01
    done = (step - warm) / (total - warm)
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done


def inverse_root(matrix: np.ndarray) -> np.ndarray:
    """Inverse square root of a positive definite matrix, by Denman-Beavers iteration."""
    y, z = matrix.copy(), np.eye(len(matrix))
    scale = np.trace(matrix) / len(matrix)
    y = y / scale
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return z / math.sqrt(scale)


class FullMatrixAdam:
    """One block."""

    def __init__(self, k: int, betas: tuple[float, float], decay: float, ridge: float = 1e-3):
        self.m, self.s, self.t = np.zeros(k), np.zeros((k, k)), 0
        self.betas, self.decay, self.ridge = betas, decay, ridge

    def step(self, x: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.s = b2 * self.s + (1 - b2) * np.outer(g, g)
        m, s = self.m / (1 - b1**self.t), self.s / (1 - b2**self.t)
        s = s + self.ridge * np.trace(s) / len(s) * np.eye(len(s))
        return x * (1 - lr * self.decay) - lr * inverse_root(s) @ m


class AdamW:
    """One block."""

    def __init__(self, k: int, betas: tuple[float, float], decay: float):
        self.m, self.v, self.t = np.zeros(k), np.zeros(k), 0
        self.betas, self.decay = betas, decay

    def step(self, x: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return x * (1 - lr * self.decay) - lr * m / (np.sqrt(v) + 1e-8)


class SGD:
    """One block; weight decay added to the gradient, as torch has it."""

    def __init__(self, k: int, momentum: float, decay: float):
        self.v, self.momentum, self.decay = np.zeros(k), momentum, decay

    def step(self, x: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.v = self.momentum * self.v + g + self.decay * x
        return x - lr * self.v


# --- a subspace


def block_columns(subspace: Any) -> list[np.ndarray]:
    specs = subspace.layout.specs
    return [
        np.concatenate([np.arange(s.start, s.stop) for s in specs if s.block == b])
        for b in range(subspace.num_blocks)
    ]


def expand(subspace: Any, x: Tensor, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    out = {s.name: torch.empty(s.shape, dtype=dtype) for s in subspace.layout.specs}
    subspace.expand(x, list(out.values()))
    return out


def use(subspace: Any, path: str) -> Any:
    """The subspace, with its products computed in this way."""
    subspace.stored._path = path
    return subspace


def check_products(subspace: Any, device: str = "cpu", rtol: float = 1e-5) -> None:
    """``project`` and ``expand`` against float64 products with the stored directions."""
    layout = subspace.layout
    u = subspace.directions.double().cpu()
    block = torch.cat([torch.full((s.stop - s.start,), s.block) for s in layout.specs]).long()
    dtype = torch.float64 if layout.dtype == torch.float64 else torch.float32
    gradients = [torch.randn(s.shape, dtype=dtype, device=device) for s in layout.specs]
    g = torch.cat([t.cpu().double().reshape(-1) for t in gradients])
    expected = torch.stack(
        [u[:, block == b] @ g[block == b] for b in range(layout.num_blocks)], dim=1
    )
    found = subspace.project(gradients).cpu()
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < rtol

    x = torch.randn_like(expected)
    out = [torch.full(s.shape, torch.nan, dtype=dtype, device=device) for s in layout.specs]
    subspace.expand(x, out)
    theta = subspace.center.cpu().double() + (u * x[:, block]).sum(0)
    flat = torch.cat([t.cpu().double().reshape(-1) for t in out])
    assert float((flat - theta).norm() / theta.norm()) < rtol
