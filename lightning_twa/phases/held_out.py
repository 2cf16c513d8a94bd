"""Data that the coefficients are not trained on, and the loss on them of what is in the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.config import Settings
from lightning_twa.machine import CommonError, gather_objects, in_common, rank, world_size
from lightning_twa.phases.batchnorm import tracked_batch_norms
from lightning_twa.phases.choose import POINTS
from lightning_twa.phases.phase_data import hold_out_loader
from lightning_twa.trainer import (
    batch_hooks,
    batch_losses,
    batch_size_of,
    batches_there,
    draw_batches,
    modules_in_training,
    show_progress,
    training_batch_size,
)

__all__ = ["HeldOut", "common_losses"]

FORWARD = 1 / 3  # of a training step that the loss alone takes
UNKNOWN = 32  # steps of a phase whose length is not known

Tick = Callable[[int], object]


def _ignore(count: int) -> None: ...


class HeldOut:
    """Held-out batches of a phase, and what measuring on them has cost. Every process calls every
    method.

    Args:
        settings: The arguments of the callback.

    Attributes:
        data: What they are, in words; ``None`` where there are none.
        reason: Why there are none.
        seconds: That measuring took.
        batches: How many, over all processes.
        there: How many there would be; ``None`` where that is not known.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.data: str | None = None
        self.reason = "heldout=None"
        self.seconds = 0.0
        self.batches = 0
        self.there: int | None = None
        self._drawn: list[Any] = []
        self._loader: Any = None
        self._refused = False

    def clear(self) -> None:
        """Forget the batches."""
        self._drawn, self._loader = [], None

    def check(self, trainer: Trainer, held_back: Any) -> None:
        """At the start of training: whether there will be held-out data, where they were asked for.

        Raises:
            ValueError: When they were, and there are none.
        """
        loader = self._find(trainer, held_back)
        if loader is None and self.settings.heldout in ("val", "twa"):
            raise ValueError(
                f"TWACallback(heldout={self.settings.heldout!r}) compares averages on held-out "
                f"data, but there are none: {self.reason}. Use heldout='auto', or None."
            )

    def try_batch(
        self, trainer: Trainer, module: LightningModule, held_back: Any, *, with_hooks: bool
    ) -> None:
        """After the first batch of training: see whether ``training_step`` has a loss for a
        held-out batch.

        Raises:
            ValueError: When it has none, and held-out data were asked for.
        """
        loader = self._find(trainer, held_back)
        if loader is None:
            return
        problem: Exception | None = None
        try:
            with in_common():
                drawn = draw_batches(loader, 1, rank(), world_size())
                losses = _losses(trainer, module, drawn, with_hooks)
                if not losses or losses[0] != losses[0]:
                    raise ValueError("it has no batch with a loss that is a number")
        except Exception as error:  # whatever the step says of a batch that it cannot take
            problem = error
        if problem is None:
            return
        text = f"{type(problem).__name__}: {problem}"
        self._refused, self.reason = True, f"training_step cannot take them ({text})"
        if self.settings.heldout != "auto":
            raise ValueError(
                f"training_step has no loss for a batch of {self.data}, on which "
                f"TWACallback(heldout={self.settings.heldout!r}) compares averages ({text}). "
                f"Return other data from a twa_dataloader() hook and pass heldout='twa'; or use "
                f"heldout=None."
            ) from problem

    def _find(self, trainer: Trainer, held_back: Any) -> Any:
        """The loader of held-out data; ``None`` without one."""
        if self._refused:
            return None
        if self._loader is None:
            found = hold_out_loader(self.settings, trainer, held_back)
            self._loader, self.data, self.reason = found
        return self._loader

    def draw(
        self,
        trainer: Trainer,
        held_back: Any,
        steps: int | None,
        comparisons: int,
    ) -> bool:
        """Take so many batches that all comparisons cost no more than the phase.

        Args:
            trainer: In training.
            held_back: Of the phase's own data; ``None`` where nothing was.
            steps: Of the phase; ``None`` where that is not known.
            comparisons: How many weights are compared before the path.

        Returns:
            Whether there are any.
        """
        self.seconds, began = 0.0, time.perf_counter()
        self._loader = None  # a run may reload its data
        loader = self._find(trainer, held_back)
        if loader is None:
            return False
        of_step, of_batch = training_batch_size(trainer), batch_size_of(loader)
        ratio = 1.0 if of_step is None or of_batch is None else of_step / of_batch
        trained = (steps or UNKNOWN) * trainer.accumulate_grad_batches * ratio
        at_most = max(int(trained / FORWARD / (comparisons + POINTS + 1)), 1)
        try:
            with in_common():
                drawn = draw_batches(loader, at_most, rank(), world_size())
                there = batches_there(loader, at_most, world_size())
        except Exception as error:  # of whatever reads the data
            self.reason = f"they could not be read ({error})"
            return False
        everywhere = gather_objects(len(drawn))
        self._drawn = drawn[: min(everywhere)]
        self.batches = min(everywhere) * world_size()
        self.there = None if there is None else there * world_size()
        if not self._drawn:
            self.reason = "they have no batch"
        self.seconds += time.perf_counter() - began
        return bool(self._drawn)

    def progress(self, trainer: Trainer, comparisons: int = 1) -> AbstractContextManager[Tick]:
        """A bar for so many calls of :meth:`measure`."""
        what, total = "measuring held-out losses", comparisons * len(self._drawn)
        return show_progress(trainer, what, " batches", total)

    def measure(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        with_hooks: bool,
        tick: Tick = _ignore,
    ) -> Tensor:
        """``(m,)`` float64 the losses of the weights in the model, on every process those of all.

        Args:
            trainer: The Trainer.
            module: The module.
            with_hooks: Whether ``on_train_batch_start`` changes batches.
            tick: Called with 1 after each batch.

        Raises:
            CommonError: When ``training_step`` fails.
        """
        began = time.perf_counter()
        losses = common_losses(trainer, module, self._drawn, with_hooks=with_hooks, tick=tick)
        self.seconds += time.perf_counter() - began
        return losses


def common_losses(
    trainer: Trainer,
    module: LightningModule,
    drawn: list[Any],
    *,
    with_hooks: bool,
    tick: Tick = _ignore,
) -> Tensor:
    """``(m,)`` float64 the losses of the weights in the model on batches, on every process those of
    all.

    Args:
        trainer: The Trainer.
        module: The module.
        drawn: Batches of this process.
        with_hooks: Whether ``on_train_batch_start`` changes batches.
        tick: Called with 1 after each batch.

    Raises:
        CommonError: When ``training_step`` fails.
    """
    with in_common(CommonError):
        own = _losses(trainer, module, drawn, with_hooks, tick)
    everywhere = [loss for losses in gather_objects(own) for loss in losses]
    return torch.tensor(everywhere, dtype=torch.float64, device="cpu")


def _losses(
    trainer: Trainer,
    module: LightningModule,
    drawn: list[Any],
    with_hooks: bool,
    tick: Tick = _ignore,
) -> list[float]:
    norms = set(tracked_batch_norms(module, modules_in_training(trainer, module)))
    hooks = batch_hooks(trainer, module) if with_hooks else ()
    return batch_losses(trainer, module, drawn, norms, hooks, tick)
