"""The optimizers of the coefficients: full-matrix Adam, AdamW and SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.config import SolverConfig

__all__ = ["FullMatrixAdam", "limit_step", "make_solver"]

RIDGE = 1e-3  # of the mean diagonal of the second moment


class FullMatrixAdam(Optimizer):
    """Adam with the full second moment of the gradient per block, which only a small space affords.

    For a parameter ``x`` of shape ``(k, B)`` with gradient ``g``, per column ``b``::

        m = beta1 * m + (1 - beta1) * g          S = beta2 * S + (1 - beta2) * g g^T
        x = x - lr * (S + ridge * mean(diag(S)) * I)^(-1/2) m      (both bias-corrected)

    The step does not change when the coefficients are rotated, nor when the loss is scaled.

    Args:
        params: Tensors of shape ``(k, B)``, float64 recommended.
        lr: Learning rate.
        betas: Decay rates of first and second moment.
        weight_decay: Decoupled, as in AdamW: ``x = x - lr * weight_decay * x``.
        ridge: Share of the mean diagonal of ``S`` added to its diagonal.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        ridge: float = RIDGE,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ridge": ridge}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. ``closure`` re-evaluates the loss, as in ``torch.optim``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    k, b = x.shape
                    state["step"] = torch.tensor(0.0, device="cpu")
                    state["exp_avg"] = torch.zeros_like(x)
                    state["second_moment"] = x.new_zeros(b, k, k)
                state["step"] += 1
                t = float(state["step"])
                g = x.grad
                state["exp_avg"].lerp_(g, 1 - beta1)
                outer = torch.einsum("ib,jb->bij", g, g)
                state["second_moment"].lerp_(outer, 1 - beta2)
                x.mul_(1 - group["lr"] * group["weight_decay"])
                direction = _precondition(
                    state["second_moment"] / (1 - beta2**t),
                    state["exp_avg"] / (1 - beta1**t),
                    group["ridge"],
                )
                x.sub_(direction, alpha=group["lr"])
        return loss


def _precondition(second_moment: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """``(S + ridge * mean(diag(S)) I)^(-1/2) m`` per block; zero where ``S`` is zero.

    Args:
        second_moment: ``(B, k, k)`` symmetric positive semi-definite.
        mean: ``(k, B)``.
        ridge: Relative ridge.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    values = values.clamp_min(0.0)  # rounding can leave eigenvalues a little below zero
    values = values + ridge * values.mean(dim=1, keepdim=True)
    root = torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    rotated = torch.einsum("bij,ib->bj", vectors, mean)
    return torch.einsum("bij,bj->ib", vectors, root * rotated)


def make_solver(config: SolverConfig, coefficients: Tensor, lr: float) -> Optimizer:
    """The optimizer of the coefficients that the configuration names."""
    betas = (float(config.betas[0]), float(config.betas[1]))
    if config.name == "full_matrix_adam":
        return FullMatrixAdam([coefficients], lr, betas, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(
            [coefficients], lr=lr, betas=betas, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        [coefficients], lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def limit_step(before: Tensor, after: Tensor, longest: float | None) -> Tensor:
    """Shorten each block's step, in place, where it is longer than allowed.

    Args:
        before: ``(m, B)`` raw parameters.
        after: The same after the step; changed.
        longest: The longest step allowed; ``None`` for any.

    Returns:
        ``(B,)`` the lengths of the steps now.
    """
    moved = after - before
    length: Tensor = moved.norm(dim=0)
    if longest is None:
        return length
    scale = (longest / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
    after.copy_(before + moved * scale)
    shortened: Tensor = length * scale
    return shortened
