"""Which names of Lightning this folder relies on that are no public API.

``tests/trainer/test_private_names.py`` says which one a release of Lightning changed.
"""

from __future__ import annotations

__all__ = ["PRIVATE_NAMES"]

# Attribute paths from a Trainer that this folder uses and that are no public API.
PRIVATE_NAMES = (
    "_accelerator_connector.use_distributed_sampler",
    "_checkpoint_connector.dump_checkpoint",
    "strategy.save_checkpoint",
    "strategy.checkpoint_io",
    "strategy.optimizers",
    "strategy._lightning_optimizers",
    "strategy.lr_scheduler_configs",
    "strategy.lightning_module_state_dict",
    "strategy.restore_checkpoint_after_setup",
    "strategy.batch_to_device",
    "strategy.root_device",
    "precision_plugin.convert_input",
    "precision_plugin.train_step_context",
    "fit_loop.setup_data",
    "fit_loop.max_batches",
    "fit_loop._data_source",
    "fit_loop._data_fetcher",
    "fit_loop._combined_loader",
    "fit_loop._can_stop_early",
    "fit_loop.epoch_progress.total.ready",
    "fit_loop.epoch_progress.total.started",
    "fit_loop.epoch_loop._build_kwargs",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop._should_accumulate",
    "fit_loop.epoch_loop.update_lr_schedulers",
    "fit_loop.epoch_loop.batch_progress.current.ready",
    "fit_loop.epoch_loop.batch_progress.current.processed",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.batch_progress.total.ready",
    "fit_loop.epoch_loop.batch_progress.total.processed",
    "fit_loop.epoch_loop.val_loop._data_source",
    "fit_loop.epoch_loop.val_loop._combined_loader",
    "fit_loop.epoch_loop.val_loop._module_mode",
    "fit_loop.epoch_loop.val_loop.run",
    "val_check_interval",
    "val_check_batch",
)
