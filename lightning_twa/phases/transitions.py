"""Which stage of a run may follow which, and by what event: the table, and what a stage answers to.

====================  ========================================================================
stage                 the run
====================  ========================================================================
``COLLECTING``        trains as usual; weights are kept as candidates
``RESUMING``          has a phase to go on with, from a checkpoint or after an interruption
``OPTIMIZING``        trains averaging coefficients
``SUSPENDED``         was interrupted; what it has is kept, and the Trainer has been given back
``DONE``              has its average in the model
====================  ========================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.phases import saved
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.checks import check_optimizers, check_parameters
from lightning_twa.phases.report import log_count
from lightning_twa.trainer import restores_late

__all__ = ["TABLE", "Event", "Stage", "StageName", "check_event", "check_following"]


class StageName(Enum):
    """Where a run is."""

    COLLECTING = "Collecting"
    RESUMING = "Resuming"
    OPTIMIZING = "Optimizing"
    SUSPENDED = "Suspended"
    DONE = "Done"


class Event(Enum):
    """What happens to a run. The values are the names of a stage's methods."""

    FIT_BEGINS = "fit_begins"
    CHECKPOINT_LOADED = "checkpoint_loaded"
    LOOPS_BEGIN = "loops_begin"
    TRAINING_BEGINS = "training_begins"
    EPOCH_BEGINS = "epoch_begins"
    BATCH_BEGINS = "batch_begins"
    BATCH_ENDED = "batch_ended"
    EPOCH_ENDED = "epoch_ended"
    VALIDATION_BEGINS = "validation_begins"
    VALIDATION_ENDED = "validation_ended"
    CHECKPOINT_WRITTEN = "checkpoint_written"
    TRAINING_ENDED = "training_ended"
    RAISED = "raised"
    FIT_ENDED = "fit_ended"


C, R, O, S, D = StageName  # noqa: E741

#: By event: in which stages it may come, and in which the run may be then. Every other pair is an
#: error, of this package or of a Trainer that does things in another order.
TABLE: Mapping[Event, Mapping[StageName, tuple[StageName, ...]]] = {
    Event.FIT_BEGINS: {C: (C,), S: (C, R), D: (D,)},
    Event.CHECKPOINT_LOADED: {C: (C, R, D), R: (C, R, D), O: (O,), S: (C, R, D), D: (C, R, D)},
    Event.LOOPS_BEGIN: {C: (C,), R: (R,), D: (D,)},
    Event.TRAINING_BEGINS: {C: (C, O), R: (O, C), D: (D, C)},
    Event.EPOCH_BEGINS: {C: (C, O), O: (O,), D: (D, C)},
    Event.BATCH_BEGINS: {C: (C, O), O: (O,), D: (D, C)},
    Event.BATCH_ENDED: {C: (C, D), O: (O, D), D: (D,)},
    Event.EPOCH_ENDED: {C: (C, D), O: (O, D), D: (D,)},
    Event.VALIDATION_BEGINS: {C: (C, D), O: (O, D), D: (D,)},
    Event.VALIDATION_ENDED: {C: (C,), O: (O,), D: (D,)},
    Event.CHECKPOINT_WRITTEN: {C: (C, D), R: (R,), O: (O, D), S: (S,), D: (D,)},
    Event.TRAINING_ENDED: {C: (C, D), O: (D,), D: (D,)},
    Event.RAISED: {C: (S,), R: (S,), O: (S,), S: (S,), D: (D,)},
    Event.FIT_ENDED: {C: (S,), R: (S,), O: (S,), D: (D,)},
}


def check_event(stage: StageName, event: Event) -> None:
    """Check that an event may come in a stage.

    Raises:
        RuntimeError: Naming both.
    """
    if stage not in TABLE[event]:
        expected = ", ".join(name.value for name in TABLE[event])
        raise RuntimeError(
            f"TWACallback: the event {event.value!r} came in stage {stage.value}, but it belongs "
            f"to {expected}. Is the callback of one Trainer used in another meanwhile? If not, "
            f"this is an error of lightning-twa, or a Trainer of a version it does not know."
        )


def check_following(stage: StageName, event: Event, following: StageName) -> None:
    """Check that a stage may follow another by an event.

    Raises:
        RuntimeError: Naming the three.
    """
    if following not in TABLE[event][stage]:
        raise RuntimeError(
            f"TWACallback: stage {following.value} cannot follow {stage.value} by the event "
            f"{event.value!r}. This is an error of lightning-twa."
        )


class Stage(ABC):
    """A stage of a run: what it answers to an event, which is the stage that the run is in then. A
    method that is not of a subclass leaves all as it is.

    Args:
        averaging: What the run has and does.
    """

    name: StageName

    def __init__(self, averaging: Averaging) -> None:
        self.averaging = averaging

    @property
    @abstractmethod
    def phase(self) -> Literal["collect", "optimize", "done"]:
        """What a user reads."""

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with; see :func:`lightning_twa.phases.saved.dump`."""
        return saved.dump(self.averaging, self.phase)

    def fit_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """The Trainer's ``fit`` was called."""
        self.averaging.collector.resolve(trainer, module)
        return self.name

    def checkpoint_loaded(self, trainer: Trainer | None, state: dict[str, Any]) -> StageName:
        """A checkpoint of a run was loaded.

        Args:
            trainer: ``None`` where no Trainer loads it.
            state: From :meth:`state_dict`.
        """
        saved.load(self.averaging, state)
        following = {"collect": C, "optimize": R, "done": D}[state["phase"]]
        if trainer is not None and restores_late(trainer) and following is not C:
            self.averaging.regain_trainer(trainer)  # the loops have begun already
        return following

    def loops_begin(self, trainer: Trainer, module: LightningModule) -> StageName:
        """The model and the optimizer are there; the Trainer's loops are about to start."""
        check_optimizers(self.averaging.settings, trainer)
        check_parameters(self.averaging.settings, module)
        return self.name

    def training_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """The first batch comes next."""
        return self.name

    def epoch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """An epoch begins."""
        return self.name

    def batch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """A batch begins."""
        self.averaging.has_trained = self.averaging.trajectory.waits = True
        return self.name

    def batch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """A batch was trained on, with or without an optimizer step."""
        return self.name

    def epoch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """An epoch ended."""
        log_count(module, self.averaging.candidate_names)
        return self.name

    def validation_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """A validation begins; none of its hooks has come."""
        return self.name

    def validation_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """A validation ended, and all of its hooks."""
        return self.name

    def checkpoint_written(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], key: str
    ) -> StageName:
        """A checkpoint is about to be written, and may still be changed.

        Args:
            trainer: The Trainer.
            module: The module.
            checkpoint: Of the Trainer.
            key: Of the callback's state in it.
        """
        saved.complete(self.averaging, module, checkpoint["callbacks"].get(key, {}))
        return self.name

    def validated_state(self) -> dict[str, Any] | None:
        """What checkpoints are to hold as the module's state; ``None`` for the module's own."""
        return None

    def training_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """The last batch, epoch and validation are over."""
        return self.name

    @abstractmethod
    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """An exception, or Ctrl+C, ended training."""

    def fit_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """The Trainer leaves ``fit``, by whatever way."""
        return self.raised(trainer, module)
