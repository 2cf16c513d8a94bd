"""What the phase changes in a Trainer, and its undo."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.machine import warn
from lightning_twa.trainer.borrowed_optimizer import BorrowedOptimizer
from lightning_twa.trainer.data import set_epoch, tear_down_fetcher
from lightning_twa.trainer.resting import RestingState
from lightning_twa.trainer.stopping import put_to_sleep

__all__ = ["TrainerSwitch"]


class PhaseEnd(int):
    """A limit of the Trainer that the phase has set: the Trainer's message that it is reached says
    so, where the user has set none or another.
    """

    def __repr__(self) -> str:
        return f"{int(self)} (the end of TWACallback's phase)"


class TrainerSwitch:
    """Lets a Trainer step the phase's optimizer, on the phase's data, and undoes it.

    The user's optimizer stays where it is, and is not stepped meanwhile; its schedulers neither.

    Args:
        trainer: The Trainer to change.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._borrowed: BorrowedOptimizer | None = None
        self._outputs: list[Tensor] = []
        self.validates_each_epoch = False
        self._user_source: Any = None
        self._user_combined_loader: Any = None
        self._resting: RestingState | None = None
        self._undo = ExitStack()

    def install_optimizer(self, optimizer: Optimizer | None, outputs: Iterable[Tensor]) -> None:
        """Let the Trainer step ``optimizer`` from the next batch on, and no scheduler.

        Args:
            optimizer: ``None``: steps change nothing.
            outputs: The parameters that it moves.
        """
        if self._borrowed is None:
            loop: Any = self.trainer.fit_loop.epoch_loop
            loop.update_lr_schedulers = _update_no_scheduler
            self._undo.callback(delattr, loop, "update_lr_schedulers")
            self._undo.callback(self._give_optimizer_back)
        self._outputs = list(outputs)
        self._borrow_optimizer(optimizer)

    def rest_optimizer(self) -> None:
        """Keep the state of the user's optimizer in main memory until :meth:`restore`, behind which
        the phase has nothing on the device. May be called again, where it has been loaded since.
        """
        if self._resting is None:
            self._resting = RestingState()
            self._undo.callback(self._resting.bring_back)
            stays = self._resting.put_away(self.trainer.strategy.optimizers)
            if stays:
                warn(
                    f"StorageConfig(offload_optimizer=True) leaves {stays / 2**20:.1f} MiB of the "
                    f"optimizer's state on the device: they are of a class of their own (parts of "
                    f"sharded tensors, or quantized ones), which nothing but the strategy can "
                    f"move. Let it keep them in main memory (FSDP's CPU offload), or leave the "
                    f"option out."
                )
        else:
            self._resting.put_away(self.trainer.strategy.optimizers)

    def _borrow_optimizer(self, optimizer: Optimizer | None) -> None:
        self._give_optimizer_back()
        self._borrowed = BorrowedOptimizer(self.trainer, self._outputs)
        self._borrowed.steps = optimizer

    def _give_optimizer_back(self) -> None:
        if self._borrowed is not None:
            self._borrowed.give_back()
            self._borrowed = None

    def look_for_another_optimizer(self) -> None:
        """Before a batch: somebody may have put another optimizer into the Trainer."""
        if self._borrowed is None:
            return
        optimizers = self.trainer.strategy.optimizers
        if len(optimizers) == 1 and optimizers[0] is not self._borrowed.user:
            self._borrow_optimizer(self._borrowed.steps)

    def put_early_stopping_to_sleep(self) -> None:
        """See :func:`~lightning_twa.trainer.stopping.put_to_sleep`."""
        self._undo.callback(put_to_sleep(self.trainer))

    def limit_epochs(self, end: int) -> None:
        """Let the run end before epoch ``end``."""
        loop = self.trainer.fit_loop
        self._undo.callback(setattr, loop, "max_epochs", loop.max_epochs)
        loop.max_epochs = end if end == loop.max_epochs else PhaseEnd(end)

    def limit_steps_to(self, end: int) -> None:
        """Let the run end after optimizer step ``end``."""
        loop = self.trainer.fit_loop.epoch_loop
        self._undo.callback(setattr, loop, "max_steps", loop.max_steps)
        loop.max_steps = end if end == loop.max_steps else PhaseEnd(end)

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
            getattr(trainer, "val_check_interval", None),  # none where it is a time
            trainer.val_check_batch if set_up else None,
        )
        self._user_source, self._user_combined_loader = source.instance, loop._combined_loader
        tear_down_fetcher(trainer)
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
        set_epoch(loop._combined_loader, trainer.current_epoch)

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
                tear_down_fetcher(trainer)
            finally:
                source.instance, trainer.val_check_batch = instance, check_batch
                for name, value in kept.items():
                    setattr(loop, name, value)
        set_epoch(self._user_combined_loader, trainer.current_epoch)
        return self._user_combined_loader

    def _restore_loader(
        self, instance: Any, combined: Any, batches: Any, interval: Any, check_batch: Any
    ) -> None:
        loop, trainer = self.trainer.fit_loop, self.trainer
        tear_down_fetcher(trainer)
        loop._data_source.instance = instance
        loop._combined_loader = combined
        loop.max_batches = batches
        if interval is not None:
            trainer.val_check_interval = interval
        if check_batch is not None:
            trainer.val_check_batch = check_batch

    def restore(self) -> None:
        """Undo everything, last change first. May be called again."""
        self._undo.close()


def _update_no_scheduler(interval: str, update_plateau_schedulers: bool) -> None:
    """In the place of the loop's method."""
