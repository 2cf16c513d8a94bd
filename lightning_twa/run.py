"""One ``fit`` with TWA: its candidates, its phase, and the moments at which something happens.

The callback's hooks call these methods; Trainer internals are behind :mod:`lightning_twa.phase`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_twa import checks, phase, replay, report, sharing
from lightning_twa.candidates import Store, persistent_buffers
from lightning_twa.collector import Collector
from lightning_twa.config import DATA, Settings
from lightning_twa.distributed import mean_over_ranks_
from lightning_twa.schedule import CollectPlan
from lightning_twa.state import FORMAT_VERSION, RAW_WEIGHTS, check_state
from lightning_twa.subspace import SubspaceOptimizer, build_subspace
from lightning_twa.subspace.columns import local_part, to_shards
from lightning_twa.swap import AverageSwap, copy_into, put_average

__all__ = ["Run"]

# Settings that checkpoints of earlier versions do not name, and what they did
LATER_SETTINGS = {"parametrization": "free", "mask_size": None}


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
        self.optimizer: SubspaceOptimizer | None = None
        self.averaging_weights: Tensor | None = None
        self.block_names: list[str] = []
        self._candidate_names: list[str] = []  # of a finished run that was restored without them
        self._loader: Any = None
        self._switch: phase.TrainerSwitch | None = None
        self._started: dict[str, Any] = {}  # epoch and optimizer step of the switch, and its data
        self._restored: dict[str, Any] | None = None  # what load_state_dict() left for enter()
        self._swap = AverageSwap()
        self._epoch_batches: int | None = None  # batches of the last whole epoch of collecting
        self._local_buffers = False  # nobody but average_buffers() makes them equal on all ranks
        self._warned = False  # of too few candidates
        self._released = False  # the Trainer has been given back, after an exception too

    @property
    def plan(self) -> CollectPlan:
        """The resolved schedule."""
        return self.collector.plan

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

    # --- set-up

    def set_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the settings and resolve the schedule; see :mod:`lightning_twa.checks`."""
        self._released = False
        self.collector.set_up(trainer, module)

    def _request_loader(self, trainer: Trainer) -> None:
        self._loader = checks.request_loader(self.settings, trainer)

    # --- collecting

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        """After a batch: take a candidate where one is due by optimizer steps."""
        self.collector.after_step(trainer, module)

    def after_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of an epoch: take a candidate where one is due."""
        self._epoch_batches = phase.batches_seen(trainer)
        self.collector.after_epoch(trainer, module)

    def start_collecting(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of training; switches where a resumed run would not, whose checkpoint was
        written behind the start of the epoch.
        """
        self.collector.start(trainer, module)
        self._request_loader(trainer)
        checks.check_data(self.settings, self.plan, trainer, self._loader, len(self.store))
        if phase.at_epoch_start(trainer):
            self.enter_if_due(trainer, module)

    # --- the phase

    def enter_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of an epoch: switch into the phase when its epoch has come."""
        if self.phase != "collect" or trainer.current_epoch < self.plan.start_epoch:
            return
        self.store.drop_damaged()
        if self.collector.count < 2:
            # Data without a length, or damaged files: the checks have seen the rest coming.
            if not self._warned:
                rank_zero_warn(
                    f"TWA needs at least two candidates, but collecting {self.plan.describe()} "
                    f"gave {self.collector.count}. Ordinary training goes on."
                )
            self._warned = True
            return
        self.collector.complete(module)
        self._switch = phase.TrainerSwitch(trainer)
        self._started = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": self._epoch_batches,
        }
        if self._loader is not None:
            self._switch.install_loader(self._loader, set_up=True)
        self._started["validates_each_epoch"] = self._switch.validates_each_epoch
        self.enter(trainer, module)

    def prepare_resume(self, trainer: Trainer) -> None:
        """Resumed inside the phase: its data must be there before the Trainer's loops start, which
        count the batches left of an epoch by it, also when there are none left.
        """
        self._switch = phase.TrainerSwitch(trainer)
        self._request_loader(trainer)
        if self._loader is not None:
            self._switch.install_loader(
                self._loader,
                set_up=False,
                validate_each_epoch=bool(self._started["validates_each_epoch"]),
            )

    def enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Build the subspace, move the model into it, and let the Trainer step the coefficients."""
        assert self._switch is not None
        to_shards(module)
        self.store.check(module)
        named = dict(module.named_parameters())
        optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        varying = self.store.varying(also={n for n, p in named.items() if id(p) in optimized})
        names = [name for name in named if name in varying]
        share = sharing.decide(
            self.settings, trainer, module, {name: named[name] for name in names}, len(self.store)
        )
        subspace = build_subspace(
            (candidate.parameters for candidate in self.store),
            self.settings.subspace,
            device=trainer.strategy.root_device,
            mixing=None if self._restored is None else self._restored["mixing"],
            columns=share.columns,
        )
        self.optimizer = SubspaceOptimizer(
            named.items(),
            subspace,
            self.settings.solver,
            total_steps=self._total_steps(trainer),
            exchange=share.exchange,
        )
        self.block_names = list(subspace.layout.block_names)
        if self._restored is None:
            copy_into(persistent_buffers(module), self.store.mean_buffers())
            self._copy_rest(named, spanned=set(names))
        else:
            self.optimizer.load_state_dict(self._restored["optimizer"])
            self._restored = None
        self._switch.install_optimizer(self.optimizer)
        if share.gradients_stay:
            self._switch.stop_gradient_sync()
        self._local_buffers = share.gradients_stay or phase.shards_parameters(trainer)
        if share.text is not None:
            rank_zero_info(share.text)
        self.phase = "optimize"
        data = self.settings.data
        epoch = self._started["epoch"]
        rank_zero_info(report.switch_report(self.optimizer, self.store.names, DATA[data], epoch))
        if data == "val":
            rank_zero_warn(
                "TWACallback(data='val') trains the averaging coefficients on the validation data: "
                "from here on validation metrics are not held out. Judge the result on test data."
            )

    def _copy_rest(self, named: dict[str, nn.Parameter], spanned: set[str]) -> None:
        """Parameters that are the same in all candidates: those from files may be others than the
        module's, which nobody will train.
        """
        *_, newest = self.store
        values = {k: v for k, v in newest.parameters.items() if k not in spanned}
        copy_into({name: local_part(named[name]) for name in values}, values)

    def average_buffers(self, module: LightningModule) -> bool:
        """Make floating-point buffers equal on all ranks where DDP does not; every rank calls it.

        Returns:
            Whether it did.
        """
        # After an exception, which other ranks may not have had, nothing is exchanged.
        if self.phase != "optimize" or self._released or not self._local_buffers:
            return False
        buffers = persistent_buffers(module).values()
        mean_over_ranks_(buffer for buffer in buffers if buffer.is_floating_point())
        return True

    def _total_steps(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the whole phase; the same number when the phase is resumed."""
        per_epoch = phase.steps_per_epoch(trainer)
        if per_epoch is None and self.settings.data == "train":
            per_epoch = phase.steps_for(trainer, self._started["epoch_batches"])
        limits = []
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps - self._started["step"])
        epochs = phase.max_epochs(trainer)
        if epochs is not None and per_epoch is not None:
            limits.append((epochs - self._started["epoch"]) * per_epoch)
        return max(min(limits), 1) if limits else None

    def finish_if_ending(self, trainer: Trainer, module: LightningModule) -> bool:
        """Finish when the batch just trained on is the last of the run. Called wherever that can
        first be known, so that the last validation and the last checkpoint see the finished
        average. Does nothing after an exception.

        Returns:
            Whether it finished the phase now.
        """
        unfinished = self.phase == "optimize" or (self.uniform and self.phase == "collect")
        if not unfinished or self._released or not phase.run_is_ending(trainer):
            return False
        if self.uniform:
            self.collector.after_epoch(trainer, module)
        self.finish(trainer, module)
        return self.phase == "done"

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Complete the average with BatchNorm statistics of its own."""
        if self.uniform:
            self._finish_uniform(trainer, module)
            return
        assert self.optimizer is not None
        self.average_buffers(module)
        if self.optimizer.parametrization.samples:
            self._write_exactly(module)
        batches = self._reestimate_batchnorm(trainer, module)
        self.averaging_weights = self.optimizer.averaging_weights
        self.phase = "done"
        for line in report.finish_report(self.optimizer, batches):
            rank_zero_info(line)
        self._report_files()

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
        self._started = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": self._epoch_batches,
            "validates_each_epoch": False,
        }
        self.store.check(module)
        put_average(module, self.store)
        batches = self._reestimate_batchnorm(trainer, module)
        self.averaging_weights = torch.full((n, 1), 1 / n, dtype=torch.float64)
        self.block_names = ["global"]
        self.phase = "done"
        rank_zero_info(report.uniform_report(self.store.names, batches))
        self._report_files()

    def _report_files(self) -> None:
        if self.store.files is not None:
            directory, size = self.store.files
            rank_zero_info(
                f"TWA: the candidates stay in {directory} ({size / 2**20:.1f} MiB). Checkpoints "
                f"written before the phase ended need them."
            )

    def _write_exactly(self, module: LightningModule) -> None:
        """A mask's average of the candidates themselves, without the rounding of the basis."""
        assert self.optimizer is not None
        beta, named = self.optimizer.averaging_weights, dict(module.named_parameters())
        for spec in self.optimizer.subspace.layout.specs:
            weights = zip(beta[:, spec.block].tolist(), self.store, strict=True)
            kept = [c.parameters[spec.name].double() for weight, c in weights if weight > 0]
            mean = torch.stack(kept).mean(dim=0)
            copy_into({spec.name: local_part(named[spec.name])}, {spec.name: mean})

    def _reestimate_batchnorm(self, trainer: Trainer, module: LightningModule) -> int | None:
        """Returns the number of batches; ``None`` when there was nothing to do, or no way to."""
        switch = self._switch or phase.TrainerSwitch(trainer)
        limit = max(self._epoch_batches or 0, phase.batches_seen(trainer))
        return replay.reestimate_batchnorm(trainer, module, switch.user_training_loader, limit)

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
        if self._switch is not None:
            self._switch.restore()
            self._switch = None
        self._loader = None
        if self.phase == "done":
            self.optimizer = None  # frees the basis

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with, in tensors, numbers, strings, lists and dicts; empty before the
        first candidate. A finished run needs no candidates any more.
        """
        if self.phase == "collect" and self.collector.count == 0:
            return {}
        state: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "phase": self.phase,
            "epoch_batches": self._epoch_batches,
            "candidate_names": self.candidate_names,
        }
        if self.phase != "done":
            state["candidates"] = self.collector.state_dict()
        if self.phase != "collect":
            state["started"] = dict(self._started)
        if self.phase == "optimize":
            if self._restored is not None:
                state.update(self._restored)
            elif self.optimizer is not None:
                state["optimizer"] = self.optimizer.state_dict()
                state["mixing"] = self.optimizer.subspace.mixing
            state["settings"] = self._fixed_settings()
        weights = self.averaging_weights
        if self.optimizer is not None:
            weights = self.optimizer.averaging_weights
        if weights is not None:
            state.update(averaging_weights=weights, block_names=list(self.block_names))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: When the state has another format or is damaged, or the phase another
                subspace or solver.
        """
        check_state(state)
        if state["phase"] == "optimize":
            begun = {**LATER_SETTINGS, **state["settings"]}
            if begun != self._fixed_settings():
                raise ValueError(
                    f"The checkpoint's phase was started with {begun}, but this callback "
                    f"has {self._fixed_settings()}. Resume with the same settings."
                )
        self.phase = state["phase"]
        self._epoch_batches = state["epoch_batches"]
        self._candidate_names = list(state["candidate_names"])
        if "candidates" in state:
            complete = self.phase != "collect"
            self.collector.load_state_dict(state["candidates"], complete=complete)
        self.averaging_weights = state.get("averaging_weights")
        self.block_names = list(state.get("block_names", []))
        if self.phase != "collect":
            self._started = dict(state["started"])
        if self.phase == "optimize":
            self._restored = {key: state[key] for key in ("optimizer", "mixing")}

    def _fixed_settings(self) -> dict[str, Any]:
        """The settings without which a phase cannot go on as it began."""
        subspace, solver = self.settings.subspace, self.settings.solver
        return {
            "basis": subspace.basis,
            "blocks": subspace.blocks,
            "rank": subspace.rank,
            "bits": subspace.bits,
            "solver": solver.name,
            "parametrization": subspace.parametrization,
            "mask_size": subspace.mask_size,
        }
