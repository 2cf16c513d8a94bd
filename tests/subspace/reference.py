"""Plain float64 versions of the formulas, written without the package's code."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


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
