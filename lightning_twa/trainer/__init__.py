"""Everything that reads or changes a Trainer, its private names included."""

from lightning_twa.trainer.batch_watch import BatchWatch, batch_hooks
from lightning_twa.trainer.borrowed_optimizer import HeldModes
from lightning_twa.trainer.checkpoint_file import (
    best_paths,
    checkpoint_directory,
    last_files,
    wait_for_files,
    write_checkpoint,
)
from lightning_twa.trainer.data import (
    has_length,
    hook_loader,
    is_empty,
    loader_batches,
    prepare_data,
    shares_of_data,
    shuffled,
    validation_loader,
)
from lightning_twa.trainer.features import (
    accumulates_gradients,
    callback_names,
    callbacks,
    has_validation_data,
    is_a,
    is_ddp,
    keeps_older_checkpoints,
    overrides,
    package_of,
    restores_late,
    scales_loss,
    shards_parameters,
    strategy_names,
)
from lightning_twa.trainer.module_hooks import LoadHook, as_saved
from lightning_twa.trainer.position import (
    at_epoch_start,
    batches_between_validations,
    batches_seen,
    epoch_is_ending,
    max_epochs,
    run_is_ending,
    step_was_taken,
    steps_for,
    steps_per_epoch,
    was_trained,
)
from lightning_twa.trainer.progress_bar import show_progress
from lightning_twa.trainer.replay import modules_in_training, training_steps, try_training_step
from lightning_twa.trainer.stopping import StopWatch, begin_stopping_anew, was_stopped_early
from lightning_twa.trainer.switch import TrainerSwitch
from lightning_twa.trainer.validation import AroundValidation, state_of_module

__all__ = [
    "AroundValidation",
    "BatchWatch",
    "HeldModes",
    "LoadHook",
    "StopWatch",
    "TrainerSwitch",
    "accumulates_gradients",
    "as_saved",
    "at_epoch_start",
    "batch_hooks",
    "batches_between_validations",
    "batches_seen",
    "begin_stopping_anew",
    "best_paths",
    "callback_names",
    "callbacks",
    "checkpoint_directory",
    "epoch_is_ending",
    "has_length",
    "has_validation_data",
    "hook_loader",
    "is_a",
    "is_ddp",
    "is_empty",
    "keeps_older_checkpoints",
    "last_files",
    "loader_batches",
    "max_epochs",
    "modules_in_training",
    "overrides",
    "package_of",
    "prepare_data",
    "restores_late",
    "run_is_ending",
    "scales_loss",
    "shards_parameters",
    "shares_of_data",
    "show_progress",
    "shuffled",
    "state_of_module",
    "step_was_taken",
    "steps_for",
    "steps_per_epoch",
    "strategy_names",
    "training_steps",
    "try_training_step",
    "validation_loader",
    "wait_for_files",
    "was_stopped_early",
    "was_trained",
    "write_checkpoint",
]
