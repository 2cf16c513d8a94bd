"""What the phase changes in a Trainer, and its undo. The only file that knows private Trainer
names.

``PRIVATE_NAMES`` lists them; ``tests/test_private_names.py`` says which one a Lightning release
changed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = ["TrainerSwitch"]

# Attribute paths from a Trainer that this file uses and that are no public API.
PRIVATE_NAMES = (
    "strategy.optimizers",
    "strategy.lr_scheduler_configs",
    "strategy.optimizer_state",
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
    "fit_loop.epoch_loop._build_kwargs",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop._should_accumulate",
    "fit_loop.epoch_loop.batch_progress.current.ready",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.val_loop._data_source",
    "fit_loop.epoch_loop.val_loop._module_mode",
    "val_check_interval",
    "val_check_batch",
)


# --- reading the Trainer


def max_epochs(trainer: Trainer) -> int | None:
    """Number of epochs of the run, ``None`` without a limit."""
    limit = trainer.fit_loop.max_epochs
    return None if limit is None or limit == -1 else int(limit)


def batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches of the current training loader per epoch, ``None`` when it has no length."""
    batches = trainer.fit_loop.max_batches
    return None if math.isinf(batches) else int(batches)


def steps_for(trainer: Trainer, batches: int | None) -> int | None:
    """Optimizer steps that so many batches give; the last one of an epoch always steps."""
    return None if batches is None else math.ceil(batches / trainer.accumulate_grad_batches)


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of the current training loader per epoch, ``None`` when it has no length."""
    return steps_for(trainer, batches_per_epoch(trainer))


def at_epoch_start(trainer: Trainer) -> bool:
    """In ``on_train_start``: whether the run starts at the beginning of an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready == 0 or progress.is_last_batch


def batches_seen(trainer: Trainer) -> int:
    """Batches of the current epoch that have been fetched for training."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def run_is_ending(trainer: Trainer) -> bool:
    """Whether the batch that was just trained on is the last of the run."""
    loop = trainer.fit_loop
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    if trainer.should_stop and loop._can_stop_early:
        return True
    limit = max_epochs(trainer)
    last_batch = loop.epoch_loop._num_ready_batches_reached()
    return limit is not None and last_batch and trainer.current_epoch + 1 >= limit


def epoch_is_ending(trainer: Trainer) -> bool:
    """Whether the batch that was just trained on is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def step_was_taken(trainer: Trainer) -> bool:
    """Whether the batch that was just trained on ended with an optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


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


# --- the data of the phase


def validation_loader(trainer: Trainer) -> Any:
    """The user's validation dataloader(s), requested anew."""
    return _request_dataloader(trainer.fit_loop.epoch_loop.val_loop._data_source)


def has_length(loader: Any) -> bool:
    """Whether a loader knows its number of batches."""
    return sized_len(loader) is not None


def hook_loader(trainer: Trainer, name: str) -> Any:
    """What the datamodule's hook ``name``, or else the module's, returns; ``None`` without one."""
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if callable(getattr(owner, name, None)):
            return _request_dataloader(type(trainer.fit_loop._data_source)(owner, name))
    return None


# --- the switch


class TrainerSwitch:
    """Puts the phase's optimizer and data into a Trainer and takes them out again.

    The user's optimizers and schedulers are neither stepped nor lost meanwhile. Schedulers stay
    visible (``self.lr_schedulers()`` in a module keeps working) with a frequency that never comes
    round.

    Args:
        trainer: The Trainer to change.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.user_optimizers: list[Optimizer] = []
        self.validates_each_epoch = False
        self._user_source: Any = None
        self._user_combined_loader: Any = None
        self._undo = ExitStack()

    def install_optimizer(self, optimizer: Optimizer) -> None:
        """Let the Trainer step ``optimizer`` from the next batch on, and no scheduler."""
        strategy = self.trainer.strategy
        self.user_optimizers = list(strategy.optimizers)
        schedulers = strategy.lr_scheduler_configs
        self._undo.callback(setattr, strategy, "optimizers", self.user_optimizers)
        self._undo.callback(setattr, strategy, "lr_scheduler_configs", schedulers)
        # Checkpoints keep the user's states: what is dumped for the phase's optimizer is theirs.
        # Every strategy then stores it as it does without the phase, also in pieces.
        dump = strategy.optimizer_state

        def dump_users(optimizer: Optimizer) -> dict[str, Any]:
            return dump(self.user_optimizers[0])

        self._undo.callback(delattr, strategy, "optimizer_state")
        strategy.optimizer_state = dump_users  # type: ignore[method-assign]
        # The setter rebuilds the wrappers that are stepped; changing the list in place would not.
        strategy.optimizers = [optimizer]
        strategy.lr_scheduler_configs = [
            dataclasses.replace(config, frequency=sys.maxsize) for config in schedulers
        ]

    def replace_optimizer(self, optimizer: Optimizer) -> None:
        """Let the Trainer step another optimizer of the phase from the next batch on."""
        self.trainer.strategy.optimizers = [optimizer]

    def limit_epochs(self, end: int) -> None:
        """Let the run end before epoch ``end``."""
        loop = self.trainer.fit_loop
        self._undo.callback(setattr, loop, "max_epochs", loop.max_epochs)
        loop.max_epochs = end

    def stop_gradient_sync(self) -> None:
        """Let DDP exchange neither gradients nor buffers from the next forward pass on."""
        model: Any = self.trainer.strategy.model
        self._undo.callback(
            setattr, model, "require_backward_grad_sync", model.require_backward_grad_sync
        )
        model.require_backward_grad_sync = False

    def install_loader(
        self, loader: Any, *, set_up: bool, validate_each_epoch: bool = False
    ) -> None:
        """Train on ``loader`` from the next epoch on.

        A ``val_check_interval`` that does not fit its length is replaced by validation at the end
        of each epoch (``validates_each_epoch``).

        Args:
            loader: What a ``train_dataloader`` hook may return.
            set_up: Prepare it now (at the start of an epoch, where the Trainer has already prepared
                the user's), rather than where the Trainer does.
            validate_each_epoch: ``validates_each_epoch`` of the run that is resumed.
        """
        loop, trainer = self.trainer.fit_loop, self.trainer
        source = loop._data_source
        self._undo.callback(
            self._restore_loader,
            source.instance,
            loop._combined_loader,
            loop.max_batches,
            trainer.val_check_interval,
            trainer.val_check_batch if set_up else None,
        )
        self._user_source, self._user_combined_loader = source.instance, loop._combined_loader
        _tear_down_fetcher(trainer)
        source.instance = loader
        loop._combined_loader = None
        if validate_each_epoch:
            self._validate_each_epoch()
        if not set_up:
            return
        try:
            loop.setup_data()
        except Exception as error:
            if "val_check_interval" not in str(error):
                raise
            loop._combined_loader = None
            self._validate_each_epoch()
            loop.setup_data()
        _set_epoch(loop._combined_loader, trainer.current_epoch)

    def _validate_each_epoch(self) -> None:
        self.validates_each_epoch = True
        self.trainer.val_check_interval = 1.0

    def user_training_loader(self) -> Any:
        """The user's prepared training data (a ``CombinedLoader``), whatever is installed now, in
        the order of the current epoch.
        """
        loop, trainer = self.trainer.fit_loop, self.trainer
        if self._user_source is None:
            return loop._combined_loader
        if self._user_combined_loader is None:  # resumed in the phase: not prepared so far
            source = loop._data_source
            names = ("_combined_loader", "_data_fetcher", "max_batches")
            kept = {name: getattr(loop, name) for name in names}
            instance, check_batch = source.instance, trainer.val_check_batch
            try:
                source.instance = self._user_source
                loop._combined_loader = loop._data_fetcher = None
                loop.setup_data()
                self._user_combined_loader = loop._combined_loader
                _tear_down_fetcher(trainer)
            finally:
                source.instance, trainer.val_check_batch = instance, check_batch
                for name, value in kept.items():
                    setattr(loop, name, value)
        _set_epoch(self._user_combined_loader, trainer.current_epoch)
        return self._user_combined_loader

    def _restore_loader(
        self, instance: Any, combined: Any, batches: Any, interval: Any, check_batch: Any
    ) -> None:
        loop, trainer = self.trainer.fit_loop, self.trainer
        _tear_down_fetcher(trainer)
        loop._data_source.instance = instance
        loop._combined_loader = combined
        loop.max_batches = batches
        trainer.val_check_interval = interval
        if check_batch is not None:
            trainer.val_check_batch = check_batch

    def restore(self) -> None:
        """Undo everything, last change first. May be called again."""
        self._undo.close()


def prepare_data(trainer: Trainer) -> None:
    """Prepare the user's training data anew for the epoch that begins."""
    loop = trainer.fit_loop
    loop._combined_loader = None
    loop.setup_data()
    _set_epoch(loop._combined_loader, trainer.current_epoch)


def _set_epoch(combined_loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by the epoch which one it is."""
    for dataloader in combined_loader.flattened:
        _set_sampler_epoch(dataloader, epoch)


def _tear_down_fetcher(trainer: Trainer) -> None:
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.teardown()
        trainer.fit_loop._data_fetcher = None


# --- forward passes over the training data


def loader_batches(combined_loader: Any) -> int | None:
    """Batches of a prepared loader in an epoch, limits included; ``None`` without a length."""
    limits = combined_loader.limits
    if limits is None or any(math.isinf(limit) for limit in limits):
        return None
    return int(max(limits))


def modules_in_training(trainer: Trainer, module: LightningModule) -> set[nn.Module]:
    """The modules that are in training mode during training, also while validation runs."""
    if not trainer.validating:
        return {m for m in module.modules() if m.training}
    captured = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return {m for name, m in module.named_modules() if captured.get(name, m.training)}


@contextmanager
def training_stage(trainer: Trainer) -> Iterator[None]:
    """Be in the training stage, as a module's hooks see it, also where validation is running."""
    stage = trainer.state.stage
    assert stage is not None, "a run is in some stage"
    trainer.state.stage = type(stage).TRAINING
    try:
        yield
    finally:
        trainer.state.stage = stage


def training_step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
    """Run the module's ``training_step`` on a batch from a loader, as the Trainer would."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    with trainer.precision_plugin.train_step_context():
        module.training_step(*arguments.values())
