"""The user's optimizer in the phase: all that it has and does, except that it steps the phase."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["BorrowedOptimizer", "HeldModes", "faces", "replace_attribute"]

UNSCALES = "_step_supports_amp_scaling"  # a fused optimizer divides by the loss scale itself


class BorrowedOptimizer:
    """Lets a user's optimizer step another one.

    The Trainer, modules and callbacks keep the optimizer that they know: its ``param_groups``,
    state, class and methods. What they write there is not lost, and has no effect on the phase.

    Args:
        trainer: Whose one optimizer is borrowed: its ``step`` is replaced until :meth:`give_back`.
        outputs: Parameters that the phase moves.

    Attributes:
        user: The user's optimizer.
        steps: The optimizer that is stepped; ``None``: steps evaluate their closure only.
    """

    def __init__(self, trainer: Trainer, outputs: Iterable[Tensor]) -> None:
        (self.user,) = (user,) = trainer.strategy.optimizers
        # of the loss; it unscales the gradients of the user's parameters
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.steps: Optimizer | None = None
        self._undo = ExitStack()
        own: Callable[..., Any] = user.step  # of the class, or a scheduler's wrapper of it

        @functools.wraps(own)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.borrowed:  # by way of a scheduler made meanwhile, which wraps this
                return own(*args, **kwargs)
            return self._step(args[0] if args else kwargs.get("closure"))

        self.borrowed = True
        self._undo.callback(setattr, self, "borrowed", False)
        replace_attribute(self._undo, user, "step", MethodType(step, user))
        if getattr(user, UNSCALES, False):
            replace_attribute(self._undo, user, UNSCALES, False)
        self._modes = HeldModes(trainer)
        self._undo.callback(self._modes.release)
        held = {id(p) for group in user.param_groups for p in group["params"]}
        self._others = [p for p in outputs if id(p) not in held]
        if self._others:
            for face in faces(trainer):
                self._clear_others_too(face)

    def _clear_others_too(self, optimizer: Optimizer) -> None:
        """Parameters that the phase moves and the user's optimizer does not have."""
        own = optimizer.zero_grad

        @functools.wraps(own)
        def zero_grad(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            for parameter in self._others:
                parameter.grad = None

        replace_attribute(self._undo, optimizer, "zero_grad", MethodType(zero_grad, optimizer))

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        phase = self.steps
        if phase is None:
            if closure is None:
                return None
            with torch.enable_grad():
                return closure()
        if self._scaler is not None:
            for parameter in self._others:
                if parameter.grad is not None:
                    parameter.grad.div_(self._scaler.get_scale())
        if closure is None and self._is_asked_for_its_state():
            return None
        return phase.step(closure)

    def _is_asked_for_its_state(self) -> bool:
        """Whether torch.distributed.checkpoint takes a step that changes nothing."""
        rates = [group.get("lr") for group in self.user.param_groups]
        if any(rate is None or float(rate) != 0.0 for rate in rates):
            return False
        parameters = [p for group in self.user.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        own = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]  # of a DTensor
        return not any(bool(gradient.any()) for gradient in own)

    def give_back(self) -> None:
        """Let the user's optimizer step as its own again. May be called again."""
        self._undo.close()
        self.steps = None


class HeldModes:
    """While other weights than an optimizer's own are in the model: ``train()`` and ``eval()`` of
    optimizers that have two sets of weights (schedule-free ones) leave the model
    alone. The optimizer is in the mode that it was told to be in when they come back.

    Args:
        trainer: Whose optimizers are held; others than such are left alone. ``None``: nothing is.
        postpone: Do what was asked for at :meth:`release`, when the optimizer's own weights are
            back; else they do not come back, and only the mode is changed, at once.
    """

    def __init__(self, trainer: Trainer | None = None, *, postpone: bool = False) -> None:
        self._undo = ExitStack()
        self._holds = True
        self._postponed: list[Callable[[], Any]] = []
        self._evaluate: list[tuple[Optimizer, Callable[[], Any]]] = []
        for optimizer in [] if trainer is None else faces(trainer):
            if _switches_weights(optimizer):
                for name in ("train", "eval"):
                    self._hold(optimizer, name, postpone)

    def __reduce__(self) -> Any:
        return HeldModes, ()  # a copy holds nothing

    def _hold(self, optimizer: Optimizer, name: str, postpone: bool) -> None:
        own = getattr(optimizer, name)
        if name == "eval":
            self._evaluate.append((optimizer, own))

        @functools.wraps(own)
        def held(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(own, *args, **kwargs)
            if not self._holds:  # by way of another that holds it still
                return call()
            if not postpone:
                return _keeping_weights(optimizer, call)
            self._postponed.append(call)
            return None

        replace_attribute(self._undo, optimizer, name, MethodType(held, optimizer))

    def settle(self) -> None:
        """Tell optimizers that hold their own weights for evaluation: what they are told to
        evaluate next is what is in the model.
        """
        for optimizer, own in self._evaluate:
            _keeping_weights(optimizer, own)

    def release(self) -> None:
        """Give the methods back, and do what was postponed. May be called again."""
        self._holds, self._evaluate = False, []
        self._undo.close()
        postponed, self._postponed = self._postponed, []
        for call in postponed:
            call()


def faces(trainer: Trainer) -> list[Any]:
    """The user's optimizers, and what modules get in their places: that has their class's methods,
    of its own.
    """
    return [*trainer.strategy.optimizers, *trainer.strategy._lightning_optimizers]


def _switches_weights(optimizer: Optimizer) -> bool:
    """Whether an optimizer has weights for training and others for evaluation."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@torch.no_grad()
def _keeping_weights(optimizer: Optimizer, call: Callable[[], Any]) -> Any:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    try:
        return call()
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


def replace_attribute(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance; ``undo`` takes it away unless somebody has set another."""
    before = vars(owner).get(name, undo)

    def put_back() -> None:
        if vars(owner).get(name) is not value:
            return
        if before is undo:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    undo.callback(put_back)
    setattr(owner, name, value)
