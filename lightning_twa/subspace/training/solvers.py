"""The optimizers of the coefficients: full-matrix Adam, AdamW and SGD.

On an accelerator (any device but the CPU) nothing of a step goes to the host: whether the gradient
is finite stays a tensor, by which what the step changes is chosen, and the inverse root of the
second moment comes from products of matrices, since every decomposition waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.config import SolverConfig
from lightning_twa.subspace.tensors import is_accelerator
from lightning_twa.subspace.training.inverse_root import InverseRoot

__all__ = [
    "FullMatrixAdam",
    "limit_step",
    "make_solver",
    "saved_solver",
    "step_where",
    "up_the_slope",
]

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
        self._roots: dict[Tensor, tuple[InverseRoot, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a state that is loaded."""
        super().__setstate__(state)
        self._roots = {}

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
                if is_accelerator(x.device):
                    ok = torch.ones((), dtype=torch.bool, device=x.device)
                    self.step_where(x, ok, x.new_zeros(x.shape[1]), limited=False)
                    continue
                state = self._state_of(x)
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

    def _state_of(self, x: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[x]
        if not state:
            k, b = x.shape
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(x)
            state["second_moment"] = x.new_zeros(b, k, k)
        return state

    @torch.no_grad()
    def step_where(self, x: Tensor, ok: Tensor, path: Tensor, *, limited: bool) -> None:
        """A step of one parameter where ``ok``, in few operations, for accelerators.

        Args:
            x: The parameter, with a gradient.
            ok: A truth without dimensions. Where it is false nothing changes, whatever the
                gradient is; the host, which does not know it, counts the step.
            path: ``(B,)``, to which the lengths of the steps are added.
            limited: Whether no column's step may be longer than the learning rate.
        """
        assert x.grad is not None
        (group,) = (g for g in self.param_groups if any(p is x for p in g["params"]))
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        state = self._state_of(x)
        t = int(state["step"]) + 1
        state["step"] = torch.tensor(float(t), device="cpu")
        if x not in self._roots:
            betas = torch.full((2,), beta1, dtype=x.dtype, device=x.device)
            betas.select(0, 1).fill_(beta2)
            self._roots[x] = InverseRoot(x, group["ridge"]), 1 - betas
        root, shares = self._roots[x]
        g = torch.where(ok, x.grad, 0.0).mT
        of_mean, of_second = torch.mul(shares, ok).unbind()
        mean = state["exp_avg"].lerp_(g.mT, of_mean)
        second = state["second_moment"].lerp_(g.unsqueeze(2) * g.unsqueeze(1), of_second)
        direction, size = root(second, mean)
        size.mul_(ok)
        # what is left to multiply with: the correction of both biases, and the root's own factor
        factor = (1 - beta2**t) ** 0.5 / (1 - beta1**t) * root.factor
        if decay != 0:
            direction = torch.addcmul(direction * (size * factor), x, ok, value=decay)
            size, factor = torch.ones_like(size), 1.0
        length = direction.norm(dim=0).mul_(size)
        if limited:  # to length * factor <= 1
            x.addcmul_(direction, size.div_(length.clamp_min(1 / factor)), value=-lr)
            length.clamp_max_(1 / factor)
        else:
            x.addcmul_(direction, size, value=-lr * factor)
        path.add_(length, alpha=lr * factor)


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
    decay = config.weight_decay
    # On an accelerator the default would take operations for several tensors at a time.
    one = {"foreach": False} if is_accelerator(coefficients.device) else {}
    if config.name == "adamw":
        return torch.optim.AdamW([coefficients], lr=lr, betas=betas, weight_decay=decay, **one)
    return torch.optim.SGD(
        [coefficients], lr=lr, momentum=config.momentum, weight_decay=decay, **one
    )


def saved_solver(solver: Optimizer) -> dict[str, Any]:
    """A copy of a solver's ``state_dict()``, on the CPU."""
    state = copy.deepcopy(solver.state_dict())
    for held in state["state"].values():
        held.update({key: v.cpu() for key, v in held.items() if isinstance(v, Tensor)})
    return state


@torch.no_grad()
def step_where(solver: Optimizer, x: Tensor, ok: Tensor, path: Tensor, *, limited: bool) -> None:
    """Step on an accelerator, where ``ok``; see :meth:`FullMatrixAdam.step_where`."""
    if isinstance(solver, FullMatrixAdam):
        solver.step_where(x, ok, path, limited=limited)
        return
    before = x.clone()
    kept = {key: value.clone() for key, value in _moments(solver, x).items()}
    solver.step()
    length = limit_step(before, x, solver.param_groups[0]["lr"] if limited else None)
    path.add_(torch.where(ok, length, 0.0))
    x.copy_(torch.where(ok, x, before))
    for key, value in _moments(solver, x).items():
        value.copy_(torch.where(ok, value, kept.get(key, 0.0)))


def _moments(solver: Optimizer, x: Tensor) -> dict[str, Tensor]:
    """What a solver keeps of gradients; it counts steps on the host."""
    state = solver.state[x].items()
    return {key: value for key, value in state if isinstance(value, Tensor) and key != "step"}


def up_the_slope(raw: Tensor, gradient: Tensor, rho: float) -> Tensor | None:
    """Where sharpness-aware minimization (Foret et al., arXiv 2010.01412) takes the gradient.

    Args:
        raw: ``(m, B)`` raw parameters.
        gradient: In them.
        rho: How far up; 0 for nowhere.

    Returns:
        The place; where there is no slope ``None`` or, on an accelerator, ``raw``.
    """
    if rho == 0:
        return None
    norm = gradient.norm()
    if not is_accelerator(raw.device):
        goes = 0 < float(norm) < float("inf")
        return raw + rho * gradient / float(norm) if goes else None
    goes_there = (norm > 0) & (norm < float("inf"))
    return raw + torch.where(goes_there, rho * gradient / norm, 0.0)


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
