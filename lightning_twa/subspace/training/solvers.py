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
from lightning_twa.subspace.training.inverse_root import InverseRoot

__all__ = [
    "FullMatrixAdam",
    "limit_step",
    "load_solver",
    "make_solver",
    "saved_solver",
    "step_where",
]

RIDGE = 1e-3  # of the mean diagonal of the second moment
COUNTS_ON_DEVICE = {"cuda", "xpu"}  # what torch's own optimizers call "capturable"


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
        # and the decay rates, and one minus these
        self._roots: dict[Tensor, tuple[InverseRoot, Tensor, Tensor]] = {}

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
                if x.device.type != "cpu":
                    self.step_where(x, x.new_ones((), dtype=torch.bool), limited=False)
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

    def _state_of(self, x: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[x]
        if not state:
            k, b = x.shape
            dtype = torch.float32 if x.device.type == "cpu" else x.dtype
            state["step"] = torch.zeros((), dtype=dtype, device=x.device)
            state["exp_avg"] = torch.zeros_like(x)
            state["second_moment"] = x.new_zeros(b, k, k)
        return state

    @torch.no_grad()
    def step_where(self, x: Tensor, ok: Tensor, *, limited: bool) -> Tensor:
        """A step of one parameter where ``ok``, in few operations, for accelerators.

        Args:
            x: The parameter, with a gradient.
            ok: A truth without dimensions. Where it is false nothing changes, whatever the
                gradient is.
            limited: Whether no column's step may be longer than the learning rate.

        Returns:
            ``(B,)`` the lengths of the steps.
        """
        assert x.grad is not None
        (group,) = (g for g in self.param_groups if any(p is x for p in g["params"]))
        state, lr, decay = self._state_of(x), group["lr"], group["weight_decay"]
        if x not in self._roots:
            betas = torch.full((2,), group["betas"][0], dtype=x.dtype, device=x.device)
            betas.select(0, 1).fill_(group["betas"][1])
            self._roots[x] = InverseRoot(x, group["ridge"]), betas, 1 - betas
        root, betas, shares = self._roots[x]
        g = torch.where(ok, x.grad, 0.0).mT
        of_mean, of_second = torch.mul(shares, ok).unbind()
        mean = state["exp_avg"].lerp_(g.mT, of_mean)
        second = state["second_moment"].lerp_(g.unsqueeze(2) * g.unsqueeze(1), of_second)
        state["step"].add_(ok)
        bias1, bias2 = (1 - torch.pow(betas, state["step"])).unbind()
        direction, size = root(second, mean)
        size.mul_(torch.where(ok, bias2.sqrt_().div_(bias1), 0.0))
        if decay != 0:
            direction = torch.addcmul(direction * size, x, ok, value=decay)
            size = torch.ones_like(size)
        length = direction.norm(dim=0).mul_(size)
        if limited:
            longer = length.clamp_min(1.0)
            size, length = size.div_(longer), length.div_(longer)
        x.addcmul_(direction, size, value=-lr)
        taken: Tensor = length.mul_(lr)
        return taken


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
    decay, device = config.weight_decay, coefficients.device.type
    # On an accelerator the defaults would take an operation for each of several tensors at a time.
    options: dict[str, Any] = {} if device == "cpu" else {"foreach": False}
    if config.name == "adamw":
        if device in COUNTS_ON_DEVICE:
            options["capturable"] = True
        return torch.optim.AdamW([coefficients], lr=lr, betas=betas, weight_decay=decay, **options)
    return torch.optim.SGD(
        [coefficients], lr=lr, momentum=config.momentum, weight_decay=decay, **options
    )


def saved_solver(solver: Optimizer) -> dict[str, Any]:
    """A copy of a solver's ``state_dict()``, on the CPU."""
    state = copy.deepcopy(solver.state_dict())
    for held in state["state"].values():
        for key, value in held.items():
            if isinstance(value, Tensor):
                held[key] = value.cpu()
    return state


def load_solver(solver: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of a solver that has worked on any device into one that works on this.

    Args:
        solver: Of one parameter; changed.
        state: Of its ``state_dict()``.
    """
    (own,) = solver.param_groups
    here: dict[Any, Any] = {key: own[key] for key in ("capturable", "foreach") if key in own}
    solver.load_state_dict(copy.deepcopy(state))
    (group,) = solver.param_groups
    for x, held in solver.state.items():
        if x.device.type == "cpu":
            continue
        group.update(here)
        if isinstance(solver, FullMatrixAdam):
            held["step"] = held["step"].to(x)
        elif here.get("capturable", False):
            held["step"] = held["step"].to(x.device)


@torch.no_grad()
def step_where(solver: Optimizer, x: Tensor, ok: Tensor, *, limited: bool) -> Tensor:
    """Step on an accelerator, where ``ok``; see :meth:`FullMatrixAdam.step_where`."""
    if isinstance(solver, FullMatrixAdam):
        return solver.step_where(x, ok, limited=limited)
    before = x.clone()
    kept = {key: held.clone() for key, held in solver.state[x].items()}
    solver.step()
    length = limit_step(before, x, solver.param_groups[0]["lr"] if limited else None)
    torch.where(ok, x, before, out=x)
    for key, held in solver.state[x].items():
        if held.device == x.device:  # else torch counts steps on the host
            held.copy_(torch.where(ok, held, kept.get(key, 0.0)))
    return torch.where(ok, length, 0.0)


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
