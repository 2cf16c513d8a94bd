"""What a run of TWA has and does; the stages say when.

Trainer internals are behind :mod:`lightning_twa.trainer`.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import Store, further_names
from lightning_twa.config import Settings
from lightning_twa.phases.collect import Collector
from lightning_twa.phases.finished import FinishedAverage
from lightning_twa.phases.optimize import Optimization
from lightning_twa.phases.placing import place_plans
from lightning_twa.phases.schedule import CollectPlan
from lightning_twa.phases.temporary import TemporaryAverage
from lightning_twa.phases.trajectory import Trajectory
from lightning_twa.results import Result
from lightning_twa.trainer import (
    AroundValidation,
    BatchWatch,
    HeldModes,
    at_epoch_start,
    epoch_is_ending,
    run_is_ending,
    was_trained,
)

__all__ = ["Averaging"]


class Averaging:
    """Candidates, phase and result of one run. Every rank of a distributed run holds one and goes
    through the same moments.

    Args:
        settings: The arguments of the callback.
        state_key: Of the callback's state in a checkpoint.

    Attributes:
        collector: The candidates, and when they are taken.
        optimization: The phase.
        temporary: The uniform average in the model's place, for a validation.
        trajectory: The way of the averaging weights through the phase.
        finished: The average, once it is complete.
        batches: Whether hooks change batches before ``training_step``.
        modes: Keeps the finished average in the model, whatever mode its optimizers are told to
            be in.
        around: What is told before and after each validation.
        block_names: Names of the coefficient blocks.
        learned: ``(n, B)`` the averaging weights of the last phase, while no optimizer has them.
        further_names: Further names of tied tensors, which candidates have once.
        kept: What an interrupted phase goes on from; ``None`` where none is.
        has_trained: Whether a batch has begun since training began: the counts of the Trainer
            before that are those of an earlier fit.
        early_stopped: Whether ``EarlyStopping`` wanted to end the run: the phase is due.
        batchnorm: Over how many batches statistics were computed last, and after which step.
        epoch_batches: Batches of the last whole epoch of collecting.
        went_on: Whether a finished run is trained on.
        result: What the last phase was worth; ``None`` before its end.
        raw: The weights and buffers that ordinary training ended with, on the CPU, where a finished
            run is to go on from them.
    """

    def __init__(self, settings: Settings, state_key: str = "TWACallback") -> None:
        self.settings = settings
        self.state_key = state_key
        self.collector = Collector(settings)
        self.batches = BatchWatch()
        self.optimization = Optimization(settings, self.batches)
        self.temporary = TemporaryAverage()
        self.trajectory = Trajectory()
        self.finished = FinishedAverage()
        self.modes = HeldModes()
        self.around = AroundValidation()
        self.block_names: list[str] = []
        self.learned: Tensor | None = None
        self.kept: dict[str, Any] | None = None
        self.further_names: dict[str, str] = {}
        self.has_trained = False
        self.early_stopped = False
        self.epoch_batches: int | None = None
        self.batchnorm: dict[str, Any] | None = None
        self.went_on = False
        self.raw: dict[str, Tensor] | None = None
        self.result: Result | None = None
        self.restored_names: list[str] = []  # of a finished run that was restored without them
        self._model: weakref.ref[LightningModule] | None = None  # None: of whichever comes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}  # a copy is of no model yet

    # --- what there is

    @property
    def plan(self) -> CollectPlan:
        """The resolved schedule of this cycle."""
        return self.collector.plan

    @property
    def cycle(self) -> int:
        """Index of the part of the run, of ``cycles``, that is trained now."""
        return self.collector.cycle

    @property
    def in_last_cycle(self) -> bool:
        """Whether no other part of the run follows."""
        return self.cycle + 1 == self.settings.cycles

    @property
    def store(self) -> Store:
        """The candidates."""
        return self.collector.store

    @property
    def candidate_names(self) -> list[str]:
        """Names of the candidates, oldest first."""
        return self.store.names or list(self.restored_names)

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)``: of the weights in the model while coefficients are trained, else those that
        were learned last.
        """
        if self.learned is not None:
            return self.learned
        return self.optimization.averaging_weights

    def forget_model(self) -> None:
        """The candidates are those of a checkpoint, for whichever model comes."""
        self._model = None

    # --- beginnings

    def meet_model(self, module: LightningModule) -> None:
        """At the start of training, once the model has the weights to go on from.

        Raises:
            ValueError: When the run was interrupted with another model: its candidates are not this
                one's.
        """
        if self._model is not None and self._model() is not module:
            raise ValueError(
                f"The TWA run that was interrupted, with {len(self.candidate_names)} candidate(s), "
                f"was of another {type(module).__name__} object than the one that fit() got now, "
                f"and goes on with that one only. Call fit() with the model of before; or resume "
                f"from a checkpoint (ckpt_path=...); or, for a new run, make a new Trainer and a "
                f"new TWACallback."
            )
        self._model, self.has_trained = weakref.ref(module), False
        self.finished.keep_directory()
        self.further_names = further_names(module)
        self.store.put_frozen_back(module)

    def start_collecting(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of training: take the candidates that are there, and check the data.

        Raises:
            ValueError: When there will be too few candidates, or a file is not this module's.
        """
        within = not at_epoch_start(trainer)
        place_plans(self.collector, trainer, self.epoch_batches, within_epoch=within)
        self.collector.catch_up(trainer, module)
        optimization = self.optimization
        self.collector.check_length(trainer, optimization.switch.request_data(trainer))
        optimization.selection.held_out.check(trainer, optimization.switch.held_back)

    def next_cycle_is_due(self, trainer: Trainer) -> bool:
        """Whether the epoch that begins belongs to the next part of the run."""
        end = self.plan.end
        return not self.in_last_cycle and end is not None and trainer.current_epoch >= end

    def has_enough_candidates(self) -> bool:
        """Whether a phase could begin now; candidates whose file has changed are left out."""
        self.store.drop_damaged()
        return self.collector.count >= 2

    def regain_trainer(self, trainer: Trainer) -> None:
        """Before the Trainer's loops start: give it the data that the phase has, or had."""
        phase, is_over = self.optimization, self.kept is None
        phase.switch.borrow_again(trainer, phase.started, is_over=is_over)

    def enter_again(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on with the phase that was kept, whose Trainer has been borrowed again."""
        self.optimization.end = self.plan.end
        self.optimization.switch.limit_steps(self.optimization.started)
        self.optimization.enter(trainer, module, self.store, self.kept)
        self.learned, self.kept = None, None
        self.block_names = self.optimization.block_names

    def keep_phase(self, kept: dict[str, Any]) -> None:
        """Keep what was learned so far, without what it was learned with.

        Args:
            kept: What the phase goes on from.
        """
        self.learned, self.kept = self.averaging_weights, kept

    # --- training

    def follow_phase(self, trainer: Trainer, module: LightningModule) -> None:
        """In the phase, after a batch: log, record, and go on with the next group of candidates
        where one is due.
        """
        optimizer = self.optimization.optimizer
        assert optimizer is not None
        # As tensors where the module is: a number would be copied there, which waits.
        lr = torch.full((), optimizer.last_lr, device=module.device)
        values = {"twa/lr": lr, "twa/coefficient_norm": optimizer.distance.to(lr)}
        # A batch size of its own: with training_step(dataloader_iter) Lightning knows none.
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        self._log_held_out(module)
        self.record_step(trainer)
        self.optimization.follow_batch(trainer, module, self.store)

    def _log_held_out(self, module: LightningModule) -> None:
        """Losses on held-out data, once each, under names that every logger takes."""
        news, self.optimization.selection.news = self.optimization.selection.news, {}
        plain = {re.sub("[^A-Za-z0-9.-]+", "_", name).strip("_"): x for name, x in news.items()}
        values = {f"twa/heldout/{name}": x for name, x in plain.items()}
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def record_step(self, trainer: Trainer) -> bool:
        """Record the averaging weights after a batch of the phase; ``False`` if they were."""
        if not (self.has_trained and was_trained(trainer) and self.trajectory.waits):
            return False
        if self.trajectory.due():
            self.record()
        return True

    def record(self) -> None:
        """Record the averaging weights of the weights in the model."""
        now = self.optimization.weights_there
        now = self.averaging_weights if now is None else now
        assert now is not None
        self.trajectory.record(now)

    def keep_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of an epoch of collecting: take a candidate where one is due."""
        self.epoch_batches = self.collector.batches_of_epoch(trainer)
        self.collector.take_epoch_end(module, trainer.current_epoch)

    def average_is_due(self, trainer: Trainer, *, epoch_is_over: bool = False) -> bool:
        """Whether the batch just trained on is the last of the run or of a cycle. Asked wherever
        that can first be known, so that the last validation and the last checkpoint see the
        finished average.

        Args:
            trainer: The Trainer.
            epoch_is_over: See :func:`lightning_twa.trainer.run_is_ending`.
        """
        if not self.has_trained or self.around.sees_others or self.batches.replaying:
            return False
        if run_is_ending(trainer, epoch_is_over=epoch_is_over):
            return True
        last = self.plan.end is not None and trainer.current_epoch + 1 >= self.plan.end
        return last and (epoch_is_over or epoch_is_ending(trainer))

    def keep_uniform(self) -> None:
        """The averaging weights are those of the uniform average, which the model holds."""
        n = len(self.store)
        self.learned = torch.full((n, 1), 1 / n, dtype=torch.float64, device="cpu")
        self.block_names = ["global"]
        self.trajectory.clear()

    # --- the end

    def release(self) -> None:
        """Undo every change to the Trainer and free the basis. May be called again."""
        self.modes.release()
        self.optimization.forget()  # before the state of the user's optimizer comes back
        self.optimization.switch.give_back()
