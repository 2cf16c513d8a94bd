"""The stages of a run that is interrupted, or has its average; see
:mod:`lightning_twa.phases.transitions`.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.machine import say
from lightning_twa.phases import saved
from lightning_twa.phases.anew import begin_cycle, go_on
from lightning_twa.phases.into_checkpoint import put_validated
from lightning_twa.phases.transitions import Stage, StageName
from lightning_twa.trainer import HeldModes, at_epoch_start

__all__ = ["Done", "Suspended"]


class Suspended(Stage):
    """Something came in between: what was learned is kept, the Trainer has been given back, and
    nothing big is on the device.
    """

    name = StageName.SUSPENDED

    @property
    def phase(self) -> Literal["collect", "optimize"]:
        """What was interrupted."""
        return "collect" if self.averaging.kept is None else "optimize"

    def fit_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Go on.

        Raises:
            ValueError: When the phase was begun with other settings.
        """
        averaging = self.averaging
        if averaging.kept is not None:
            saved.check_settings(averaging.settings, averaging.kept, "phase that was interrupted")
        averaging.collector.resolve(trainer, module)
        return StageName.COLLECTING if averaging.kept is None else StageName.RESUMING

    def checkpoint_written(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], key: str
    ) -> StageName:
        """As before the interruption. Other ranks may not have had it: nothing is exchanged."""
        if self.phase == "collect":
            put_validated(self.averaging, trainer, module, checkpoint)
        return super().checkpoint_written(trainer, module, checkpoint, key)

    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Nothing is left to be given back."""
        return self.name


class Done(Stage):
    """The average is complete, and in the model."""

    name = StageName.DONE
    phase = "done"
    _at_start = False  # of an epoch, when training began

    def loops_begin(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Give the Trainer the data of the phase that has ended, for what is left of its epoch."""
        super().loops_begin(trainer, module)
        averaging = self.averaging
        averaging.modes.release()
        if averaging.settings.continue_from is not None:
            for limit in ("stops_at", "stops_at_step"):  # of the phase that is over
                averaging.optimization.started.pop(limit, None)
        averaging.regain_trainer(trainer)
        averaging.modes = HeldModes(trainer)
        return self.name

    def training_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Begin the next cycle where it is due."""
        averaging, self._at_start = self.averaging, at_epoch_start(trainer)
        if not (self._at_start and averaging.next_cycle_is_due(trainer)):
            return self.name
        averaging.meet_model(module)
        begin_cycle(averaging, trainer)
        averaging.start_collecting(trainer, module)
        return StageName.COLLECTING

    def epoch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Begin the next cycle where it is due, or go on with a finished run.

        Raises:
            RuntimeError: After the last one, unless it may go on.
        """
        averaging = self.averaging
        if self._may_go_on():
            go_on(averaging, trainer, module)
            return StageName.COLLECTING
        self._refuse_to_go_on(trainer)
        if not averaging.next_cycle_is_due(trainer):
            return self.name
        begin_cycle(averaging, trainer)
        return StageName.COLLECTING

    def batch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """A run that is resumed behind an epoch's last batch may have no start of the next.

        Raises:
            RuntimeError: After the last cycle, unless it may go on.
        """
        own_data = self.averaging.settings.data != "train"
        if self._may_go_on() and self._at_start and not own_data:
            go_on(self.averaging, trainer, module)
            super().batch_begins(trainer, module)
            return StageName.COLLECTING
        self._refuse_to_go_on(trainer)
        return super().batch_begins(trainer, module)

    def _may_go_on(self) -> bool:
        averaging = self.averaging
        return averaging.in_last_cycle and averaging.settings.continue_from is not None

    def _refuse_to_go_on(self, trainer: Trainer) -> None:
        if self.averaging.in_last_cycle:
            raise RuntimeError(
                f"The TWA phase of this run was finished, but the Trainer goes on with epoch "
                f"{trainer.current_epoch}. Pass TWACallback(continue_from='average') or 'raw' to "
                f"train on from the average or from the weights before it, from the start of an "
                f"epoch on; or load the averaged weights into a new run (load_from_checkpoint, a "
                f"new Trainer and a new TWACallback)."
            )

    def validation_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """It sees the average."""
        self.averaging.finished.validated = True
        return self.name

    def training_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Give the Trainer back; the average stays in the model."""
        self.averaging.release()
        self.averaging.modes = HeldModes(trainer)
        return self.name

    def fit_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Compare what the model and its files hold with the average."""
        self.averaging.finished.compare(module, "At the end of the run")
        self.averaging.finished.tell_of_best(trainer)
        if self.averaging.finished.validated is False and trainer.enable_validation:
            say(
                "TWA: no validation of this run saw the average: no metric of it was logged, and "
                "no checkpoint was chosen by one. trainer.validate(model) measures it."
            )
        return self.raised(trainer, module)

    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Give the Trainer back."""
        self.averaging.modes.settle()
        self.averaging.release()
        return self.name
