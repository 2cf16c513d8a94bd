"""What a Trainer is made of: strategy, precision, callbacks, and which hooks are in use."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "accumulates_gradients",
    "callback_names",
    "callbacks",
    "count_of_callbacks",
    "has_validation_data",
    "is_a",
    "is_ddp",
    "keeps_older_checkpoints",
    "overrides",
    "package_of",
    "restores_late",
    "scales_loss",
    "shards_parameters",
    "strategy_names",
]


def has_validation_data(trainer: Trainer) -> bool:
    """Whether the run has a validation dataloader, from ``fit`` or from a hook."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()) and (
        trainer.fit_loop.epoch_loop.val_loop._data_source.instance is not None
    )


def strategy_names(trainer: Trainer) -> set[str]:
    """Names of the strategy's class and its bases."""
    return {cls.__name__ for cls in type(trainer.strategy).__mro__}


def is_a(thing: object, name: str) -> bool:
    """Whether a class of this name is among an object's; there are two packages of Lightning."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def package_of(thing: object) -> str:
    """The package of Lightning that a Trainer or a callback is of: ``lightning.pytorch`` or
    ``pytorch_lightning``.
    """
    modules = [cls.__module__ for cls in type(thing).__mro__]
    old = any(module.split(".")[0] == "pytorch_lightning" for module in modules)
    return "pytorch_lightning" if old else "lightning.pytorch"


def overrides(owner: LightningModule | Callback, name: str) -> bool:
    """Whether a module or callback defines a hook that its base class in Lightning has."""
    bases = [c for c in type(owner).__mro__ if c.__name__ in ("LightningModule", "Callback")]
    return any(getattr(type(owner), name, None) is not getattr(b, name, None) for b in bases[-1:])


def count_of_callbacks(trainer: Trainer, name: str) -> int:
    """How many callbacks are of a class, or of one that derives from it."""
    return sum(is_a(callback, name) for callback in callbacks(trainer))


def callback_names(trainer: Trainer) -> set[str]:
    """Names of the classes of all callbacks, and of their bases."""
    return {cls.__name__ for callback in callbacks(trainer) for cls in type(callback).__mro__}


def scales_loss(trainer: Trainer) -> bool:
    """Whether the loss is scaled (``16-mixed``)."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def accumulates_gradients(trainer: Trainer) -> bool:
    """Whether gradients of several batches are accumulated at any time of the run."""
    found = [c for c in callbacks(trainer) if is_a(c, "GradientAccumulationScheduler")]
    schedulers: list[Any] = list(found)
    return trainer.accumulate_grad_batches > 1 or any(
        scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers
    )


def callbacks(trainer: Trainer) -> list[Callback]:
    """All callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def is_ddp(trainer: Trainer) -> bool:
    """Whether the strategy has wrapped the model in ``DistributedDataParallel``."""
    return isinstance(trainer.strategy.model, DistributedDataParallel)


def shards_parameters(trainer: Trainer) -> bool:
    """Whether the strategy leaves each process a part of each parameter (``DTensor``)."""
    return "ModelParallelStrategy" in strategy_names(trainer)


def restores_late(trainer: Trainer) -> bool:
    """Whether checkpoints are loaded after ``on_fit_start``."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def keeps_older_checkpoints(trainer: Trainer) -> bool:
    """Whether checkpoint callbacks keep others than the newest checkpoint, or each its own."""
    return len(trainer.checkpoint_callbacks) > 1 or any(
        getattr(callback, "monitor", None) is not None
        or getattr(callback, "save_top_k", -1) not in (0, 1)
        for callback in trainer.checkpoint_callbacks
    )
