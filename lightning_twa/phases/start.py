"""The switch: the phase's data and optimizer in the Trainer, and the Trainer given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.config import DATA, Settings
from lightning_twa.machine import in_common
from lightning_twa.phases.phase_data import request_loader
from lightning_twa.trainer import (
    TrainerSwitch,
    begin_stopping_anew,
    has_length,
    prepare_data,
    try_training_step,
)

__all__ = ["Switch"]


class Switch:
    """What the phase borrows of a Trainer.

    Args:
        settings: The arguments of the callback.

    Attributes:
        held_back: A loader of samples of the phase's own data that it is not trained on.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loader: Any = None
        self.held_back: Any = None
        self._changes: TrainerSwitch | None = None

    @property
    def sized(self) -> bool:
        """Whether the phase's data has a length, or is the training data."""
        return self._loader is None or has_length(self._loader)

    def request_data(self, trainer: Trainer) -> Any:
        """Get the data of the phase, early; see
        :func:`lightning_twa.phases.phase_data.request_loader`.
        """
        self._loader, self.held_back = request_loader(self.settings, trainer)
        return self._loader

    def try_data(self, trainer: Trainer) -> None:
        """After the first batch of training: see whether ``training_step`` takes a batch of the
        phase's data, where these are others.

        Raises:
            ValueError: On every process, when it does not.
        """
        if self._loader is None:
            return
        with in_common(ValueError):
            try:
                try_training_step(trainer, trainer.lightning_module, self._loader)
            except Exception as error:  # whatever the step says of a batch that it cannot take
                raise ValueError(
                    f"training_step cannot take a batch of {DATA[self.settings.data]}, on which "
                    f"TWACallback(data={self.settings.data!r}) is to train the coefficients from "
                    f"start_epoch on ({type(error).__name__}: {error}). Return a dataloader whose "
                    f"batches it can take from a twa_dataloader() hook of the module, and pass "
                    f"data='twa'; or use data='train'."
                ) from error

    def borrow(
        self,
        trainer: Trainer,
        epoch_batches: int | None,
        stops: Mapping[str, int],
        steps_in_epoch: int,
    ) -> dict[str, Any]:
        """Give the Trainer the phase's data, at the start of an epoch; of the training data, within
        one too.

        Args:
            trainer: The Trainer.
            epoch_batches: Batches of the last whole epoch of training.
            stops: Where the run is to end, if that is not the Trainer's own end: an epoch under
                ``stops_at``, or an optimizer step under ``stops_at_step``.
            steps_in_epoch: Optimizer steps that were taken in this epoch.

        Returns:
            When the phase began, and what is needed to borrow the Trainer again.
        """
        self._changes = TrainerSwitch(trainer)
        self._changes.put_early_stopping_to_sleep()
        started: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": epoch_batches,
            "steps_in_epoch": steps_in_epoch,
            **stops,
        }
        if "stops_at" in started:
            self._changes.limit_epochs(started["stops_at"])
        self.limit_steps(started)
        if self._loader is None:
            self.request_data(trainer)  # of another cycle than the first
        if self._loader is not None:
            self._changes.install_loader(self._loader, set_up=True)
        started["validates_each_epoch"] = self._changes.validates_each_epoch
        return started

    def borrow_again(self, trainer: Trainer, started: Mapping[str, Any], *, is_over: bool) -> None:
        """Before a run goes on within the phase: its data must be there before the Trainer's loops
        start, which count the batches left of an epoch by it, also when there are none left.

        Args:
            trainer: The Trainer.
            started: From :meth:`borrow`.
            is_over: Whether the phase has ended. Else :meth:`limit_steps` is still to come.
        """
        self.give_back()
        self._changes = TrainerSwitch(trainer)
        self._changes.put_early_stopping_to_sleep()
        if "stops_at" in started:
            self._changes.limit_epochs(started["stops_at"])
        if is_over:
            self.limit_steps(started)
        self.request_data(trainer)
        if self._loader is not None:
            self._changes.install_loader(
                self._loader,
                set_up=False,
                validate_each_epoch=bool(started["validates_each_epoch"]),
            )

    def limit_steps(self, started: Mapping[str, Any]) -> None:
        """Let the run end with the phase's steps, where it does. While a Trainer's loops begin it
        counts epochs otherwise where there is such a limit: in a run that goes on within the phase
        this comes behind that.
        """
        assert self._changes is not None
        if "stops_at_step" in started:
            self._changes.limit_steps_to(started["stops_at_step"])

    def let_optimizer_rest(self) -> None:
        """Free the device of what the phase does not need, where that was asked for."""
        assert self._changes is not None
        if self.settings.storage.offload_optimizer:
            self._changes.rest_optimizer()

    def step_with(
        self, optimizer: Optimizer, outputs: Iterable[Tensor], *, gradients_stay: bool
    ) -> None:
        """Let the Trainer step the phase's optimizer from the next batch on.

        Args:
            optimizer: Of the phase.
            outputs: The parameters that it moves.
            gradients_stay: Whether DDP is to exchange neither gradients nor buffers.
        """
        assert self._changes is not None
        self._changes.install_optimizer(optimizer, outputs)
        if gradients_stay:
            self._changes.stop_gradient_sync()

    def step_next(self, optimizer: Optimizer, outputs: Iterable[Tensor]) -> None:
        """Let the Trainer step another optimizer of the same phase."""
        assert self._changes is not None
        self._changes.install_optimizer(optimizer, outputs)

    def step_nothing(self, trainer: Trainer) -> None:
        """Let the Trainer's steps change nothing, whether it is borrowed or not."""
        if self._changes is None:
            self._changes = TrainerSwitch(trainer)
        self._changes.install_optimizer(None, ())

    def follow_optimizer(self) -> None:
        """See :meth:`~lightning_twa.trainer.switch.TrainerSwitch.look_for_another_optimizer`."""
        if self._changes is not None:
            self._changes.look_for_another_optimizer()

    def training_data(self, trainer: Trainer) -> Any:
        """The user's prepared training data, whatever is installed now."""
        return (self._changes or TrainerSwitch(trainer)).user_training_loader()

    def give_back(self) -> None:
        """Undo every change to the Trainer. May be called again."""
        if self._changes is not None:
            self._changes.restore()
            self._changes = None
        self._loader = self.held_back = None

    def leave(self, trainer: Trainer) -> None:
        """Give the Trainer back at the start of an epoch, which then trains as usual."""
        loader = self._loader
        self.give_back()
        begin_stopping_anew(trainer)
        if loader is not None:
            prepare_data(trainer)
