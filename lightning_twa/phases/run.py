"""One run of TWA: the stage that it is in, and the events that lead from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Module

from lightning_twa.candidates import Store
from lightning_twa.config import Settings
from lightning_twa.machine import say
from lightning_twa.phases import last_stages, stages
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.copies import copied
from lightning_twa.phases.migrate import load_candidates, load_raw_weights
from lightning_twa.phases.optimize import Optimization
from lightning_twa.phases.saved import unfreeze_as_before
from lightning_twa.phases.temporary import few_of
from lightning_twa.phases.transitions import (
    Event,
    Stage,
    StageName,
    check_event,
    check_following,
)
from lightning_twa.results import Result
from lightning_twa.trainer import LoadHook, at_epoch_start

__all__ = ["Run"]

STAGES: dict[StageName, type[Stage]] = {
    stage.name: stage
    for stage in (
        stages.Collecting,
        stages.Resuming,
        stages.Optimizing,
        last_stages.Suspended,
        last_stages.Done,
    )
}


class Run:
    """A run, whatever stage it is in.

    Args:
        settings: The arguments of the callback.
        state_key: Of the callback's state in a checkpoint.

    Attributes:
        averaging: What it has and does.
        stage: Where it is.
    """

    def __init__(self, settings: Settings, state_key: str = "TWACallback") -> None:
        self.averaging = Averaging(settings, state_key)
        self.stage: Stage = stages.Collecting(self.averaging)
        self._load_hook = LoadHook()
        self._loaded: Mapping[str, Any] = {}  # state_dict of the checkpoint that is being loaded

    def of(self, trainer: Trainer) -> Run:
        """The run of a Trainer that begins to fit: this one where that Trainer goes on, else a new
        one.
        """
        now = self.averaging
        return self if trainer.global_step > 0 else Run(now.settings, now.state_key)

    def __getstate__(self) -> dict[str, Any]:
        """See :func:`lightning_twa.phases.copies.copied`."""
        stage = copied(self.stage)
        bare = Run(self.averaging.settings, self.averaging.state_key)  # around no Trainer
        return {**vars(bare), "averaging": stage.averaging, "stage": stage}

    def tell(self, event: Event, *arguments: Any) -> None:
        """Let the stage answer an event, and go to the stage that follows.

        Args:
            event: What happened.
            arguments: See the method of :class:`~lightning_twa.phases.transitions.Stage` that has
                its name.

        Raises:
            RuntimeError: When the event cannot come in this stage.
        """
        stage = self.stage.name
        check_event(stage, event)
        if event in (Event.TRAINING_BEGINS, Event.EPOCH_BEGINS):
            at_start = event is Event.EPOCH_BEGINS or at_epoch_start(arguments[0])
            self.averaging.collector.note_epoch(arguments[0], at_start=at_start)
        following: StageName = getattr(self.stage, event.value)(*arguments)
        check_following(stage, event, following)
        if following is not stage:
            self.stage = STAGES[following](self.averaging)

    def meet_checkpoint(
        self,
        trainer: Trainer,
        module: LightningModule,
        checkpoint: dict[str, Any],
        state: dict[str, Any] | None,
    ) -> None:
        """A checkpoint to go on from was read; its weights are in the module.

        Args:
            trainer: The Trainer.
            module: The module.
            checkpoint: Of the Trainer.
            state: Of the callback in it, which is loaded next; ``None`` or empty where it has none.

        Raises:
            ValueError: When it is a file of the average, which has nothing to go on with.
        """
        # Not by optimizer_states, which a sharded checkpoint has elsewhere
        if state and state.get("phase") == "done" and "lr_schedulers" not in checkpoint:
            raise ValueError(
                f"{trainer.ckpt_path} holds an average alone: there is no optimizer's state in it "
                f"to go on with. To train on from the average, load its weights into the module "
                f"({type(module).__name__}.load_from_checkpoint) and call fit() without ckpt_path. "
                f"To go on with the run, resume from its last checkpoint; "
                f"TWACallback(continue_from=...) says with which weights."
            )
        load_raw_weights(module, checkpoint, self._load_hook)
        self._loaded = self._load_hook.before or checkpoint.get("state_dict", {})
        if state:
            unfreeze_as_before(module, state)
            if state["phase"] == "done":
                self.averaging.finished.restore(checkpoint, module)
        elif checkpoint.get("global_step", 0) > 0:  # not the learning rate finder's own
            say("TWA: the checkpoint holds no candidates; collecting starts here.")
            self._begin_anew(trainer, module)

    def load(self, trainer: Trainer | None, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            trainer: ``None`` where no Trainer loads it.
            state: From a checkpoint, which :meth:`meet_checkpoint` has seen.
        """
        self.tell(Event.CHECKPOINT_LOADED, trainer, state)
        if trainer is not None:
            module, kept = trainer.lightning_module, self.averaging.kept
            if load_candidates(self.store, module, self._loaded, self._load_hook) and kept:
                kept.pop("subspace", None)  # it is of the candidates as they were

    def _begin_anew(self, trainer: Trainer, module: LightningModule) -> None:
        """What an interrupted run of the same Trainer had is later than the checkpoint."""
        if self.stage.name is not StageName.COLLECTING or self.averaging.candidate_names:
            self.averaging = Averaging(self.averaging.settings, self.averaging.state_key)
            self.averaging.collector.resolve(trainer, module)
            self.stage = stages.Collecting(self.averaging)

    def complete_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], key: str
    ) -> None:
        """A checkpoint is about to be written; outside of a fit, too."""
        if self.stage.name is not StageName.COLLECTING or trainer.state.fn == "fit":
            self.tell(Event.CHECKPOINT_WRITTEN, trainer, module, checkpoint, key)

    def watch_loading(self, module: LightningModule) -> None:
        """See what the module's hook makes of a checkpoint."""
        self._load_hook.watch(module)

    def surround_validations(self, trainer: Trainer, module: LightningModule) -> None:
        """Tell what happens around each validation, from the start of training on; see whether
        hooks change batches.
        """
        self._forget_loading()
        self.averaging.batches.install(trainer, module)
        self.averaging.around.install(
            trainer,
            begins=lambda: self.tell(Event.VALIDATION_BEGINS, trainer, module),
            ended=lambda: self.tell(Event.VALIDATION_ENDED, trainer, module),
            validated=lambda: self.stage.validated_state(),
            look=lambda: few_of(module, [n for n, _ in module.named_parameters()]),
        )

    def let_go(self) -> None:
        """Undo what the above changed. May be called again."""
        self.averaging.around.remove()
        self.averaging.batches.remove()
        self._forget_loading()

    def look_at(self, batch: Any) -> None:
        """After a batch of training: see whether a hook has changed it."""
        self.averaging.batches.look(batch)

    def _forget_loading(self) -> None:
        self._load_hook.release()
        self._loaded = {}

    def check_validated(self, module: LightningModule) -> None:
        """At the first batch of a validation: warn where it sees other weights than it should."""
        self.averaging.temporary.check(module)

    def compare(self, module: LightningModule, doing: str) -> None:
        """Warn where a model does not hold the finished average; see
        :class:`~lightning_twa.phases.finished.FinishedAverage`.
        """
        if self.stage.name is StageName.DONE:
            self.averaging.finished.compare(module, doing)

    def bring_files_up_to_date(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of training; see :class:`~lightning_twa.phases.finished.FinishedAverage`."""
        if self.stage.name is StageName.DONE:
            key = self.averaging.state_key
            self.averaging.finished.bring_files_up_to_date(trainer, module, key)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with; safe for ``torch.load(weights_only=True)``."""
        return self.stage.state_dict()

    # --- what is read; see lightning_twa.results

    @property
    def phase(self) -> Literal["collect", "optimize", "done"]:
        """What the run is in, or was when it was interrupted."""
        return self.stage.phase

    @property
    def store(self) -> Store:
        """The candidates."""
        return self.averaging.store

    @property
    def optimization(self) -> Optimization:
        """The phase."""
        return self.averaging.optimization

    @property
    def candidate_names(self) -> list[str]:
        """Names of the candidates, oldest first."""
        return self.averaging.candidate_names

    @property
    def further_names(self) -> dict[str, str]:
        """Further names of tied tensors."""
        return self.averaging.further_names

    @property
    def block_names(self) -> list[str]:
        """Names of the coefficient blocks."""
        return self.averaging.block_names

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)``, of the weights in the model or learned last."""
        return self.averaging.averaging_weights

    @property
    def result(self) -> Result | None:
        """What the last phase was worth."""
        return self.averaging.result

    @property
    def average_path(self) -> str | None:
        """The file of the finished average."""
        return self.averaging.finished.path

    def average_state_dict(self, module: Module | None = None) -> dict[str, Tensor]:
        """The finished average."""
        return self.averaging.finished.state_dict(module)

    @property
    def averaging_path(self) -> Tensor | None:
        """``(points, n, B)``, the way through the last phase."""
        return self.averaging.trajectory.points
