"""Hooks that change a batch on its way to ``training_step``, as mixing or normalising ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_twa.trainer.features import callbacks, is_a, overrides

__all__ = ["BatchWatch", "batch_hooks"]

LOOKS = 20  # batches: a hook may change one of several only
OF_LIGHTNING = ("lightning", "pytorch_lightning")


class BatchWatch:
    """Finds out whether anything changes batches between their transfer and ``training_step``, by
    looking at the first ones. Only then the hooks are called for batches that are no training: they
    may do other things, too.

    Attributes:
        changed: Whether something does.
        replaying: Whether batches pass that are no training.
    """

    def __init__(self) -> None:
        self.changed = self.replaying = False
        self._left = LOOKS
        self._before: list[Tensor] | None = None
        self._undo = ExitStack()

    def __reduce__(self) -> Any:
        return BatchWatch, ()

    def install(self, trainer: Trainer, module: LightningModule) -> None:
        """From the next batch on.

        Args:
            trainer: The Trainer, at the start of training.
            module: The module.
        """
        self.remove()
        self._left = LOOKS
        if not batch_hooks(trainer, module):
            return
        strategy = trainer.strategy
        transfer = strategy.batch_to_device

        def transferred(*args: Any, **kwargs: Any) -> Any:
            batch = transfer(*args, **kwargs)
            if trainer.training and not self.replaying:
                self._before = [tensor.detach().clone() for tensor in _tensors(batch)]
            return batch

        self._undo.callback(delattr, strategy, "batch_to_device")
        strategy.batch_to_device = transferred  # type: ignore[method-assign]

    @contextmanager
    def in_replay(self) -> Iterator[None]:
        """While batches pass that are no training; a hook may save then, and begin another."""
        before, self.replaying = self.replaying, True
        try:
            yield
        finally:
            self.replaying = before

    def look(self, batch: Any) -> None:
        """After a batch: compare it with what it was."""
        before, self._before = self._before, None
        if before is None:
            return
        now = _tensors(batch)
        self.changed |= len(now) != len(before) or not all(map(_same, before, now))
        self._left -= 1
        if self.changed or self._left <= 0:
            self.remove()

    def remove(self) -> None:
        """Undo it. May be called again."""
        self._before = None
        self._undo.close()


def batch_hooks(trainer: Trainer, module: LightningModule) -> list[Callable[[Any, int], Any]]:
    """``on_train_batch_start`` of the user's callbacks and of the module, in Lightning's order, as
    functions of a batch and its index.
    """
    name = "on_train_batch_start"
    found: list[Callable[[Any, int], Any]] = []
    for callback in callbacks(trainer):
        own = name in vars(callback) or overrides(callback, name)
        ours = is_a(callback, "TWAHooks")
        if own and not ours and type(callback).__module__.split(".")[0] not in OF_LIGHTNING:
            hook: Any = getattr(callback, name)
            found.append(lambda batch, i, hook=hook: hook(trainer, module, batch, i))  # type: ignore[misc]
    if name in vars(module) or overrides(module, name):
        found.append(module.on_train_batch_start)
    return found


def _tensors(batch: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    apply_to_collection(batch, Tensor, leaves.append)
    return leaves


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
