"""One ``fit`` with TWA: its candidates, its phases, and the moments at which something happens.

The callback's hooks call these methods; Trainer internals are behind :mod:`lightning_twa.phase`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_twa import phase, replay, report
from lightning_twa.candidates import Store, further_names
from lightning_twa.collector import Collector
from lightning_twa.optimization import Optimization
from lightning_twa.path import AveragingPath
from lightning_twa.schedule import CollectPlan
from lightning_twa.settings import Settings
from lightning_twa.state import FORMAT_VERSION, RAW_WEIGHTS, check_state
from lightning_twa.stopping import StopWatch, renew_patience
from lightning_twa.swap import AverageSwap, put_average

__all__ = ["Run"]


class Run:
    """State of one ``fit``. Every rank of a distributed run holds one and goes through the same
    moments.

    Args:
        settings: The arguments of the callback.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.phase: Literal["collect", "optimize", "done"] = "collect"
        self.collector = Collector(settings)
        self.optimization = Optimization(settings)
        self.block_names: list[str] = []
        self._learned: Tensor | None = None  # the averaging weights of the last finished phase
        self._candidate_names: list[str] = []  # of a finished run that was restored without them
        self.further_names: dict[str, str] = {}  # of tied tensors, which candidates have once
        self.path = AveragingPath()
        self._swap = AverageSwap()
        self._watch: StopWatch | None = None
        self._stopped = False  # early stopping wanted to end the run: the phase is due
        self._epoch_batches: int | None = None  # batches of the last whole epoch of collecting
        self.had_too_few = False  # candidates, when the phase was due
        self._released = False  # the Trainer has been given back, after an exception too

    @property
    def plan(self) -> CollectPlan:
        """The resolved schedule of this cycle."""
        return self.collector.plan

    @property
    def cycle(self) -> int:
        """Index of the part of the run, of ``cycles``, that is trained now."""
        return self.collector.cycle

    @property
    def finished(self) -> bool:
        """Whether the last average is complete."""
        return self.phase == "done" and self.cycle + 1 == self.settings.cycles

    @property
    def uniform(self) -> bool:
        """Whether the average is uniform, and no phase is trained."""
        return self.settings.solver.name == "uniform"

    @property
    def store(self) -> Store:
        """The candidates."""
        return self.collector.store

    @property
    def candidate_names(self) -> list[str]:
        """Names of the candidates, oldest first."""
        return self.store.names or list(self._candidate_names)

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)``: of the weights in the model while coefficients are trained, else those that
        were learned last.
        """
        if self.phase == "optimize":
            now = self.optimization.averaging_weights
            return self._learned if now is None else now
        return self._learned

    # --- set-up

    def set_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the settings and resolve the schedule; see :mod:`lightning_twa.checks`."""
        self._released = False
        self.collector.set_up(trainer, module)

    def prepare_resume(self, trainer: Trainer) -> None:
        """See :meth:`Optimization.prepare_resume`."""
        self.optimization.prepare_resume(trainer)

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of training. What is due at the start of an epoch happens here for a resumed
        run, whose checkpoint was written behind it.
        """
        self.further_names = further_names(module)
        self.store.put_frozen_back(module)
        if self.phase == "optimize":
            self._enter(trainer, module)
        at_epoch_start = phase.at_epoch_start(trainer)
        if at_epoch_start:
            self._begin_cycle_if_due(trainer, module)
        if self.phase != "collect":
            return
        self.collector.start(trainer, module)
        loader = self.optimization.request_loader(trainer)
        self.collector.check_data(trainer, loader)
        if self.settings.start_on_early_stopping and not self._stopped:
            self._watch = StopWatch(trainer, lambda: self._could_begin(trainer))
        if at_epoch_start:
            self._begin_phase_if_due(trainer, module)

    # --- collecting

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        """After a batch: take a candidate where one is due, or go on with the next group."""
        if self.phase == "collect":
            self.collector.after_step(trainer, module)
            return
        now = self.averaging_weights
        if self.phase == "optimize" and now is not None and self.path.due():
            self.path.record(now)
        self.optimization.after_step(trainer, module, self.store)

    def after_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of an epoch: take a candidate where one is due."""
        self._epoch_batches = phase.batches_seen(trainer)
        self.collector.after_epoch(trainer, module)

    def start_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of an epoch: begin the next cycle, and the phase, where they are due."""
        self._begin_cycle_if_due(trainer, module)
        self._begin_phase_if_due(trainer, module)

    def _begin_cycle_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        """Train as usual from the learned average on, and collect anew."""
        end = self.plan.end
        if self.cycle + 1 == self.settings.cycles or end is None or trainer.current_epoch < end:
            return
        if self.phase == "optimize":  # its last batch was not known to be the last
            self.finish(trainer, module)
        self.optimization.leave(trainer)
        self.collector.begin_cycle()
        # what was learned and validated belongs to other candidates
        self._learned, self.block_names, self._candidate_names = None, [], []
        self.path.clear()
        self._swap = AverageSwap()
        self.phase = "collect"
        self.had_too_few = False

    # --- the phase

    def _could_begin(self, trainer: Trainer) -> bool:
        """Whether there will be enough candidates at the end of this epoch."""
        return self.phase == "collect" and self.collector.count_after(trainer.current_epoch) >= 2

    def _begin_phase_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        """Switch into the phase when its epoch has come."""
        self._stopped = self._stopped or (self._watch is not None and self._watch.stopped)
        plan, epoch = self.plan, trainer.current_epoch
        if self.phase != "collect" or not (epoch >= plan.start_epoch or self._stopped):
            return
        self.store.drop_damaged()
        if self.collector.count < 2:
            # Data without a length, or damaged files: the checks have seen the rest coming.
            if not self.had_too_few:
                rank_zero_warn(
                    f"TWA needs at least two candidates, but collecting {plan.describe()} "
                    f"gave {self.collector.count}. Ordinary training goes on."
                )
            self.had_too_few = True
            return
        stops_at = None
        if self._stopped and epoch < plan.start_epoch and plan.end is not None:
            stops_at = epoch + plan.end - plan.start_epoch
        self._stop_watching()
        if self._stopped:
            renew_patience(trainer)
        self.collector.complete(module)
        self.optimization.end = plan.end
        self.optimization.begin(trainer, module, self.store, self._epoch_batches, stops_at)
        self._entered()
        self.path.clear()
        start = self.averaging_weights
        if start is not None:
            self.path.record(start)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.release()
            self._watch = None

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on with a phase that is resumed."""
        self.optimization.end = self.plan.end
        self.optimization.enter(trainer, module, self.store)
        self._entered()

    def _entered(self) -> None:
        self.block_names = self.optimization.block_names
        self.phase = "optimize"

    def average_buffers(self, module: LightningModule) -> bool:
        """See :meth:`Optimization.average_buffers`; after an exception, which other ranks may not
        have had, nothing is exchanged.
        """
        if self.phase != "optimize" or self._released:
            return False
        return self.optimization.average_buffers(module)

    def finish_if_ending(self, trainer: Trainer, module: LightningModule) -> bool:
        """Finish when the batch just trained on is the last of the run or of a cycle. Called
        wherever that can first be known, so that the last validation and the last checkpoint see
        the finished average. Does nothing after an exception.

        Returns:
            Whether it finished the phase now.
        """
        unfinished = self.phase == "optimize" or (self.uniform and self.phase == "collect")
        if not unfinished or self._released:
            return False
        if not phase.run_is_ending(trainer) and not self._cycle_is_ending(trainer):
            return False
        if self.uniform:
            self.collector.after_epoch(trainer, module)
        self.finish(trainer, module)
        return self.phase == "done"

    def _cycle_is_ending(self, trainer: Trainer) -> bool:
        last = self.plan.end is not None and trainer.current_epoch + 1 >= self.plan.end
        return last and phase.epoch_is_ending(trainer)

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Complete the average with BatchNorm statistics of its own."""
        if self.uniform:
            self._finish_uniform(trainer, module)
            return
        self.average_buffers(module)
        weights = self.optimization.finish(module, self.store)
        batches = self._reestimate_batchnorm(trainer, module)
        self.optimization.report(weights, batches)
        self._done(weights)

    def _finish_uniform(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the uniform average of the candidates, of which there may be none, in place."""
        self.store.drop_damaged()
        self.collector.complete(module)
        n = len(self.store)
        if n == 0:
            rank_zero_warn(
                f"There is nothing to average: the run ended before epoch "
                f"{self.plan.collect_start}. The weights are those of ordinary training."
            )
            return
        self.optimization.started = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": self._epoch_batches,
            "validates_each_epoch": False,
        }
        self.store.check(module)
        put_average(module, self.store)
        batches = self._reestimate_batchnorm(trainer, module)
        self.block_names = ["global"]
        rank_zero_info(report.uniform_report(self.store.names, batches))
        self._done(torch.full((n, 1), 1 / n, dtype=torch.float64))

    def _done(self, averaging_weights: Tensor) -> None:
        self._learned = averaging_weights
        self.phase = "done"
        if self.path.points is not None:
            self.path.record(averaging_weights)
        if self.store.files is not None:
            directory, size = self.store.files
            rank_zero_info(
                f"TWA: the candidates stay in {directory} ({size / 2**20:.1f} MiB). Checkpoints "
                f"written before the phase ended need them."
            )

    def _reestimate_batchnorm(self, trainer: Trainer, module: LightningModule) -> int | None:
        """Returns the number of batches; ``None`` when there was nothing to do, or no way to."""
        loader = self.optimization.user_training_loader(trainer)
        limit = max(self._epoch_batches or 0, phase.batches_seen(trainer))
        return replay.reestimate_batchnorm(trainer, module, loader, limit)

    # --- validation of the uniform average while collecting

    def swap_average_in(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the uniform average of the candidates so far into the model."""
        self._swap.put_in(module, self.store, lambda: self._reestimate_batchnorm(trainer, module))

    def swap_average_out(self, module: LightningModule) -> None:
        """Put the weights back; does nothing where they are in place."""
        self._swap.take_out(module)

    def average_in_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Give a checkpoint that is written while collecting the average that was validated last,
        and the weights to go on from under a key of their own.
        """
        if self.phase != "collect" or phase.shards_parameters(trainer):
            return
        averaged = self._swap.averaged(checkpoint["state_dict"])
        if averaged is not None:
            checkpoint[RAW_WEIGHTS] = checkpoint["state_dict"]
            checkpoint["state_dict"] = averaged

    # --- the end

    def release(self, module: LightningModule) -> None:
        """Undo every change to Trainer and weights; keep what was learned. May be called again."""
        self._released = True
        self.swap_average_out(module)
        self._stop_watching()
        self.optimization.release()
        if self.phase == "done":
            self.optimization.forget()

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with, in tensors, numbers, strings, lists and dicts; empty before the
        first candidate. A finished phase needs no candidates any more.
        """
        if self.phase == "collect" and self.collector.count == 0 and self.cycle == 0:
            return {}
        state: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "phase": self.phase,
            "cycle": self.cycle,
            "stopped": self._stopped or (self._watch is not None and self._watch.stopped),
            "epoch_batches": self._epoch_batches,
            "candidate_names": self.candidate_names,
        }
        if self.phase != "done":
            state["candidates"] = self.collector.state_dict()
        if self.phase != "collect":
            state["started"] = dict(self.optimization.started)
        if self.phase == "optimize":
            state.update(self.optimization.state_dict())
        weights = self.averaging_weights
        if weights is not None:
            state.update(averaging_weights=weights, block_names=list(self.block_names))
        if self.path.points is not None:
            state["path"] = self.path.state_dict()
        return state

    def complete_state(self, module: LightningModule, state: dict[str, Any]) -> None:
        """Leave frozen parameters that are as in the module out, and name what the phase trains.

        Args:
            module: The model.
            state: From :meth:`state_dict`; changed in place.
        """
        if "candidates" in state:
            self.store.leave_out_frozen(state["candidates"], module)
        if state.get("phase") == "optimize":
            state["trained"] = [n for n, p in module.named_parameters() if p.requires_grad]

    @staticmethod
    def unfreeze_as_before(module: LightningModule, state: Mapping[str, Any]) -> None:
        """Resumed inside the phase: let what had gradients have them again. ``BackboneFinetuning``
        freezes before every ``fit`` and unfreezes at one epoch only. This comes before DDP wraps
        the model, which then synchronizes these gradients.

        Args:
            module: The model.
            state: As :meth:`complete_state` left it; one of an earlier version changes nothing.
        """
        check_state(state)
        if state["phase"] == "optimize":
            parameters = dict(module.named_parameters())
            for name in parameters.keys() & state.get("trained", []):
                parameters[name].requires_grad_(True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: When the state has another format or is damaged, or the phase another
                subspace or solver, or the run fewer cycles.
        """
        check_state(state)
        cycle = state.get("cycle", 0)
        if cycle >= self.settings.cycles:
            raise ValueError(
                f"The checkpoint is in cycle {cycle + 1} of a run, but cycles="
                f"{self.settings.cycles}. Resume with the same settings."
            )
        if state["phase"] == "optimize":
            self.optimization.load_state_dict(state)
        self.phase = state["phase"]
        self.collector.cycle = cycle
        self._stopped = state.get("stopped", False)
        self._epoch_batches = state["epoch_batches"]
        self._candidate_names = list(state["candidate_names"])
        if "candidates" in state:
            complete = self.phase != "collect"
            self.collector.load_state_dict(state["candidates"], complete=complete)
        self._learned = state.get("averaging_weights")
        self.block_names = list(state.get("block_names", []))
        if "path" in state:
            self.path.load_state_dict(state["path"])
        if self.phase != "collect":
            self.optimization.started = dict(state["started"])
