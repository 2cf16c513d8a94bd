"""The stages of a run that trains. Their methods are named by the event that they answer, and say
what is done then; how it is done stands in what they call. See
:mod:`lightning_twa.phases.transitions`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.candidates import name_files
from lightning_twa.phases import fallback, saved
from lightning_twa.phases.anew import begin_cycle
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.beginning import phase_is_due
from lightning_twa.phases.finish import (
    complete_phase,
    complete_uniform,
    warn_of_no_average,
    warn_of_too_few,
)
from lightning_twa.phases.fitting import fit_before_validation, put_average_in
from lightning_twa.phases.into_checkpoint import bring_up_to_date, put_validated
from lightning_twa.phases.placing import place_plans
from lightning_twa.phases.report import log_count
from lightning_twa.phases.transitions import Stage, StageName
from lightning_twa.trainer import (
    StopWatch,
    at_epoch_start,
    shards_parameters,
    state_of_module,
    step_was_taken,
)

__all__ = ["Collecting", "Optimizing", "Resuming"]


class Collecting(Stage):
    """Ordinary training, of which weights are kept as candidates."""

    name = StageName.COLLECTING
    phase = "collect"

    def __init__(self, averaging: Averaging) -> None:
        super().__init__(averaging)
        self._watch: StopWatch | None = None
        self._had_too_few = False  # candidates, when the phase was due
        self._tried = False  # whether training_step takes the phase's data
        self._between_steps = True  # no gradient is accumulated

    def training_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Check the data. What is due at the start of an epoch happens here too, for a checkpoint
        that was written behind it.
        """
        averaging, at_start = self.averaging, at_epoch_start(trainer)
        averaging.meet_model(module)
        if at_start and averaging.next_cycle_is_due(trainer):
            begin_cycle(averaging, trainer)
        averaging.start_collecting(trainer, module)
        self._watch_stopping(trainer)
        return self._begin_phase_if_due(trainer, module) if at_start else self.name

    def _watch_stopping(self, trainer: Trainer) -> None:
        wanted = self.averaging.settings.start_on_early_stopping
        if wanted and self._watch is None and not self.averaging.early_stopped:
            self._watch = StopWatch(trainer, lambda: self._could_begin(trainer))

    def _could_begin(self, trainer: Trainer) -> bool:
        """Whether there will be enough candidates at the end of this epoch."""
        return self.averaging.collector.count_after(trainer.current_epoch) >= 2

    def epoch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Begin the next cycle, or the phase, where they are due."""
        if self.averaging.next_cycle_is_due(trainer):  # there was no phase in this one
            begin_cycle(self.averaging, trainer)
            self._had_too_few = False
        averaging = self.averaging
        place_plans(averaging.collector, trainer, averaging.epoch_batches, narrows=True)
        self._between_steps = True
        return self._begin_phase_if_due(trainer, module)

    def batch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Begin the phase within an epoch, where it is due at an optimizer step."""
        super().batch_begins(trainer, module)
        self._watch_stopping(trainer)
        if not self._between_steps or self._had_too_few:
            return self.name
        averaging = self.averaging
        if averaging.collector.timed.is_due(trainer, averaging.plan.start_step):
            batches = averaging.epoch_batches
            place_plans(averaging.collector, trainer, batches, within_epoch=True, narrows=True)
        return self._begin_phase_if_due(trainer, module, within_epoch=True)

    def _begin_phase_if_due(
        self, trainer: Trainer, module: LightningModule, *, within_epoch: bool = False
    ) -> StageName:
        averaging = self.averaging
        averaging.early_stopped = self.wants_to_stop()
        due = phase_is_due(averaging, trainer, within_epoch=within_epoch)
        if not (due or (averaging.early_stopped and not within_epoch)):
            return self.name
        if not averaging.has_enough_candidates():
            if not self._had_too_few:
                warn_of_too_few(averaging)
            self._had_too_few = True
            return self.name
        self._stop_watching()
        fallback.begin_phase(averaging, trainer, module, within_epoch=within_epoch)
        return StageName.OPTIMIZING

    def wants_to_stop(self) -> bool:
        """Whether ``EarlyStopping`` does."""
        return self.averaging.early_stopped or (self._watch is not None and self._watch.stopped)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.release()
            self._watch = None

    def batch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Take candidates by steps; after the first batch, see whether the phase's data will do."""
        if not self._tried:
            self._tried = True
            phase = self.averaging.optimization
            phase.switch.try_data(trainer)
            phase.selection.try_batch(trainer, module, phase.switch.held_back)
        self._between_steps = step_was_taken(trainer)
        self.averaging.collector.follow_step(trainer, module)
        return self._finish_if_due(trainer, module)

    def epoch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Take a candidate."""
        self.averaging.keep_epoch_end(trainer, module)
        following = self._finish_if_due(trainer, module, epoch_is_over=True)
        log_count(module, self.averaging.candidate_names)
        return following

    def validation_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Validate the uniform average if asked to."""
        following = self._finish_if_due(trainer, module)
        if following is self.name and self.averaging.settings.validate_average:
            put_average_in(self.averaging, trainer, module)
        return following

    def validation_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Put the weights back."""
        shards = shards_parameters(trainer)
        state = None if shards else partial(state_of_module, trainer)
        self.averaging.temporary.take_out(module, state)
        return self.name

    def validated_state(self) -> dict[str, Any] | None:
        """The average that was validated last; while it is in the model, what is there."""
        temporary = self.averaging.temporary
        return None if temporary.in_place else temporary.validated

    def checkpoint_written(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], key: str
    ) -> StageName:
        """Give the checkpoint the weights to go on from, and what is due at its step."""
        following = self._finish_if_due(trainer, module)
        if following is StageName.DONE:
            bring_up_to_date(self.averaging, trainer, checkpoint, key)
            return following
        averaging = self.averaging
        with averaging.temporary.weights_in_place(module):
            if averaging.has_trained and averaging.collector.follow_step(trainer, module):
                state = self.state_dict()
                if state:
                    checkpoint["callbacks"][key] = state
            own = checkpoint["callbacks"].get(key, {})
            if "candidates" in own:
                name_files(averaging.store, own["candidates"])
                averaging.collector.add_sharded_averages(own["candidates"])
            saved.complete(self.averaging, module, own)
        put_validated(self.averaging, trainer, module, checkpoint)
        return following

    def training_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Average now where there is to be no phase; else say why there was none."""
        if self.averaging.settings.uniform:
            return self._complete(trainer, module)
        self.averaging.store.settle()
        warn_of_no_average(self.averaging, trainer, self._had_too_few)
        return self.name

    def _finish_if_due(
        self, trainer: Trainer, module: LightningModule, *, epoch_is_over: bool = False
    ) -> StageName:
        averaging = self.averaging
        due = averaging.average_is_due(trainer, epoch_is_over=epoch_is_over)
        if not averaging.settings.uniform or not due:
            return self.name
        averaging.temporary.take_out(module)
        averaging.collector.follow_step(trainer, module)  # somebody may save before our own hook
        averaging.collector.take_epoch_end(module, trainer.current_epoch)
        return self._complete(trainer, module)

    def _complete(self, trainer: Trainer, module: LightningModule) -> StageName:
        done = complete_uniform(self.averaging, trainer, module)
        return StageName.DONE if done else self.name

    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Put the weights back; keep the candidates, off the device."""
        self.averaging.early_stopped = self.wants_to_stop()
        self._stop_watching()
        self.averaging.temporary.take_out(module)
        self.averaging.release()
        self.averaging.store.pending.leave()
        self.averaging.temporary.free()
        self.averaging.collector.averages.free_device()
        return StageName.SUSPENDED

    def state_dict(self) -> dict[str, Any]:
        """The candidates."""
        return saved.dump(self.averaging, self.phase, stopped=self.wants_to_stop())


class Resuming(Stage):
    """A phase is to go on, and has not yet been entered."""

    name = StageName.RESUMING
    phase = "optimize"

    def loops_begin(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Give the Trainer the phase's data."""
        super().loops_begin(trainer, module)
        self.averaging.regain_trainer(trainer)
        return self.name

    def training_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Enter the phase; it may be over already."""
        averaging = self.averaging
        averaging.meet_model(module)
        averaging.enter_again(trainer, module)
        if not (at_epoch_start(trainer) and averaging.next_cycle_is_due(trainer)):
            return StageName.OPTIMIZING
        complete_phase(averaging, trainer, module)
        begin_cycle(averaging, trainer)
        averaging.start_collecting(trainer, module)
        return StageName.COLLECTING

    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Keep what the phase goes on from."""
        self.averaging.release()
        return StageName.SUSPENDED


class Optimizing(Stage):
    """The Trainer steps averaging coefficients."""

    name = StageName.OPTIMIZING
    phase = "optimize"

    def checkpoint_loaded(self, trainer: Trainer | None, state: dict[str, Any]) -> StageName:
        """Somebody (the learning rate finder) has trained meanwhile, and takes it back.

        Raises:
            RuntimeError: When the checkpoint is not of this phase.
        """
        averaging = self.averaging
        if trainer is None or not saved.is_of_phase(averaging, state):
            raise RuntimeError(
                "A checkpoint of before the TWA phase, or of another run, was loaded within the "
                "phase. Load checkpoints before start_epoch, or resume with fit(ckpt_path=...)."
            )
        saved.go_back(averaging, trainer, state)
        return self.name

    def batch_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Others may have changed the Trainer's optimizer, or the weights, at the start of the
        epoch.
        """
        if not self.averaging.optimization.failed:
            self.averaging.optimization.look_before_batch(trainer)
        return super().batch_begins(trainer, module)

    def batch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Log and record the step."""
        fallback.follow_phase(self.averaging, trainer, module)
        return self._finish_if_due(trainer, module)

    def epoch_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Finish where something has stopped the run, or data were shorter than they said."""
        following = self._finish_if_due(trainer, module, epoch_is_over=True)
        log_count(module, self.averaging.candidate_names)
        return following

    def validation_begins(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Finish before the last validation."""
        following = self._finish_if_due(trainer, module)
        if following is self.name:
            self.averaging.optimization.average_buffers(module)
            if not self.averaging.optimization.failed:
                fit_before_validation(self.averaging, trainer, module)
        return following

    def checkpoint_written(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], key: str
    ) -> StageName:
        """Finish a run that was stopped (EarlyStopping) after the last event."""
        following = self._finish_if_due(trainer, module)
        if following is StageName.DONE:
            bring_up_to_date(self.averaging, trainer, checkpoint, key)
            return following
        failed = self.averaging.optimization.failed
        if not failed and self.averaging.record_step(trainer):
            checkpoint["callbacks"][key] = self.state_dict()
        if self.averaging.optimization.average_buffers(module):
            checkpoint["state_dict"] = state_of_module(trainer)
        return super().checkpoint_written(trainer, module, checkpoint, key)

    def training_ended(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Finish, where the end could not be known before."""
        complete_phase(self.averaging, trainer, module)
        self.averaging.release()
        return StageName.DONE

    def _finish_if_due(
        self, trainer: Trainer, module: LightningModule, *, epoch_is_over: bool = False
    ) -> StageName:
        if not self.averaging.average_is_due(trainer, epoch_is_over=epoch_is_over):
            return self.name
        complete_phase(self.averaging, trainer, module)
        return StageName.DONE

    def raised(self, trainer: Trainer, module: LightningModule) -> StageName:
        """Keep what was learned, and free the device; a phase that has failed begins anew."""
        if self.averaging.optimization.failed:
            self.averaging.learned, self.averaging.block_names = None, []
        else:
            self.averaging.keep_phase(saved.phase_to_keep(self.averaging))
        self.averaging.release()
        return StageName.SUSPENDED

    def state_dict(self) -> dict[str, Any]:
        """What the phase goes on from; of one that has failed, the candidates."""
        failed = self.averaging.optimization.failed
        return saved.dump(self.averaging, "collect" if failed else self.phase)
