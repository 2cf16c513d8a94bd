"""Where a Trainer is in its run: epochs, batches, optimizer steps, and what is left of them."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

__all__ = [
    "at_epoch_start",
    "batches_between_validations",
    "batches_in_all",
    "batches_per_epoch",
    "batches_seen",
    "epoch_is_ending",
    "max_epochs",
    "run_is_ending",
    "step_was_taken",
    "steps_for",
    "steps_per_epoch",
    "was_trained",
]


def max_epochs(trainer: Trainer) -> int | None:
    """Number of epochs of the run, ``None`` without a limit."""
    limit = trainer.fit_loop.max_epochs
    return None if limit is None or limit == -1 else int(limit)


def batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches of the current training loader per epoch, ``None`` when it has no length."""
    batches = trainer.fit_loop.max_batches
    return None if math.isinf(batches) else int(batches)


def batches_between_validations(trainer: Trainer) -> int | None:
    """Batches of an epoch from one validation to the next; ``None`` where they are validated at its
    end only, or by time.
    """
    interval: Any = trainer.val_check_batch
    return None if interval is None or math.isinf(interval) else int(interval)


def steps_for(trainer: Trainer, batches: int | None) -> int | None:
    """Optimizer steps that so many batches give; the last one of an epoch always steps."""
    return None if batches is None else math.ceil(batches / trainer.accumulate_grad_batches)


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of the current training loader per epoch, ``None`` when it has no length, or
    the module steps its optimizers itself.
    """
    if not trainer.lightning_module.automatic_optimization:
        return None
    return steps_for(trainer, batches_per_epoch(trainer))


def at_epoch_start(trainer: Trainer) -> bool:
    """In ``on_train_start``: whether the run starts at the beginning of an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready == 0 or progress.is_last_batch


def batches_in_all(trainer: Trainer, *, trained: bool = False) -> int:
    """Batches of the run that have been fetched for training, or trained on. Of a run that is
    resumed behind an epoch's last batch the counts of the epoch go on in the next one; these tell.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed if trained else progress.ready)


def batches_seen(trainer: Trainer) -> int:
    """Batches of the current epoch that have been fetched for training."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def was_trained(trainer: Trainer) -> bool:
    """Whether the newest batch belongs to the epoch that is under way, and has been trained on.

    At the start of an epoch the counts of batches are still those of the epoch before it. An epoch
    is ``ready`` before its first hook and ``started`` behind it, which their totals agree on: of a
    run that is resumed at the start of an epoch ``current`` has one more ``started`` than ``ready``
    ever after. ``completed`` is of no use: in the first epoch of a run that is resumed behind the
    last batch of an epoch it is ``started`` too.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.total
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(epoch.started >= epoch.ready and batch.processed >= batch.ready)


def run_is_ending(trainer: Trainer, *, epoch_is_over: bool = False) -> bool:
    """Whether a batch was just trained on, and is the last of the run.

    Args:
        trainer: The Trainer.
        epoch_is_over: Whether it was the last of its epoch, also where data has promised more.
    """
    loop = trainer.fit_loop
    if not was_trained(trainer):
        return False
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    if trainer.should_stop and loop._can_stop_early:
        return True
    limit = max_epochs(trainer)
    ending = epoch_is_over or epoch_is_ending(trainer)
    return limit is not None and ending and trainer.current_epoch + 1 >= limit


def epoch_is_ending(trainer: Trainer) -> bool:
    """Whether a batch was just trained on, and is the last of its epoch."""
    reached = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return bool(reached) and was_trained(trainer)


def step_was_taken(trainer: Trainer) -> bool:
    """Whether the batch that was just trained on ended with an optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()
