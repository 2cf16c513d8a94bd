"""The phase in which coefficients are trained: from the switch to the finished average."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_twa import checks, phase, report, sharing
from lightning_twa.candidates import Store, persistent_buffers
from lightning_twa.config import DATA
from lightning_twa.distributed import mean_over_ranks_
from lightning_twa.groups import Groups
from lightning_twa.progress import progress_bar
from lightning_twa.settings import Settings
from lightning_twa.subspace import (
    Subspace,
    SubspaceOptimizer,
    build_subspace,
    local_part,
    to_shards,
)
from lightning_twa.swap import copy_into, put_weighted

__all__ = ["Optimization"]

# Settings that checkpoints of earlier versions do not name, and what they did

# Of what a phase may have been begun with before these settings were kept
LATER_SETTINGS = {"parametrization": "free", "mask_size": None, "group_size": None}


class Optimization:
    """Switches a Trainer to training coefficients, and undoes it.

    Args:
        settings: The arguments of the callback.

    Attributes:
        optimizer: While coefficients are trained.
        block_names: Names of the coefficient blocks.
        started: Epoch and optimizer step of the switch, and what its data needs.
        end: Epoch at which the phase ends; ``None`` where only the Trainer ends it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.optimizer: SubspaceOptimizer | None = None
        self.block_names: list[str] = []
        self.started: dict[str, Any] = {}
        self._doubtful: list[str] = []  # frozen at the switch, though the user's optimizer has them
        self.end: int | None = None
        self._groups: Groups | None = None
        self._solver = settings.solver  # with the radius of a soup
        self._steps_before = 0  # of the groups before the current one
        self._skipped_before = 0
        self._loader: Any = None
        self.losses = report.LossRecord()
        self._began = 0.0
        self._share: sharing.Sharing | None = None
        self._switch: phase.TrainerSwitch | None = None
        self._restored: dict[str, Any] | None = None  # what load_state_dict() left for enter()
        self._local_buffers = False  # nobody but average_buffers() makes them equal on all ranks

    # --- the switch

    def request_loader(self, trainer: Trainer) -> Any:
        """Get the data of the phase, early; see :func:`lightning_twa.checks.request_loader`."""
        self._loader = checks.request_loader(self.settings, trainer)
        return self._loader

    def begin(
        self,
        trainer: Trainer,
        module: LightningModule,
        store: Store,
        epoch_batches: int | None,
        stops_at: int | None = None,
    ) -> None:
        """Switch, at the start of an epoch.

        Args:
            trainer: The Trainer.
            module: The module.
            store: The candidates.
            epoch_batches: Batches of the last whole epoch of training.
            stops_at: Epoch at which the run is to end, where that is not the Trainer's.
        """
        self._switch = phase.TrainerSwitch(trainer)
        self.started = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": epoch_batches,
        }
        if stops_at is not None:
            self.started["stops_at"] = stops_at
            self._switch.limit_epochs(stops_at)
        if self._loader is not None:
            self._switch.install_loader(self._loader, set_up=True)
        self.started["validates_each_epoch"] = self._switch.validates_each_epoch
        self.enter(trainer, module, store)

    def prepare_resume(self, trainer: Trainer) -> None:
        """Resumed inside the phase: its data must be there before the Trainer's loops start, which
        count the batches left of an epoch by it, also when there are none left.
        """
        self._switch = phase.TrainerSwitch(trainer)
        if "stops_at" in self.started:
            self._switch.limit_epochs(self.started["stops_at"])
        self.request_loader(trainer)
        if self._loader is not None:
            self._switch.install_loader(
                self._loader,
                set_up=False,
                validate_each_epoch=bool(self.started["validates_each_epoch"]),
            )

    def enter(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """Build the subspace, move the model into it, and let the Trainer step the coefficients."""
        assert self._switch is not None
        self._began, self.losses = time.perf_counter(), report.LossRecord()
        to_shards(module)
        store.check(module)
        named = dict(module.named_parameters())
        groups = trainer.optimizers[0].param_groups
        held_by_user = {id(p) for g in groups for p in g["params"]}
        optimized = {name: p for name, p in named.items() if id(p) in held_by_user}
        varying = store.varying(also={n for n, p in optimized.items() if p.requires_grad})
        spanned = {name: p for name, p in named.items() if name in varying}
        if self._restored is None:
            frozen = {name for name, p in optimized.items() if not p.requires_grad}
            self._doubtful = [name for name in optimized if name in frozen & varying]
        size = self.settings.subspace.group_size
        held = len(store) if size is None else min(size, len(store))
        share = sharing.decide(self.settings, trainer, module, spanned, held)
        total_steps, layout = self._total_steps(trainer), share.columns.whole
        self.block_names = list(layout.block_names)
        if size is not None and size < len(store):
            self._groups = Groups(len(store), layout.num_blocks, size, _known(total_steps))
            left_out = self._groups.count - self._groups.total_steps
            if left_out > 0:
                rank_zero_warn(
                    f"group_size={size} makes {self._groups.count} groups, but the phase has "
                    f"{total_steps} optimizer steps: the last {left_out} are left out. Use a "
                    f"larger group_size, or a longer phase."
                )
        restored, self._restored = self._restored, None
        if restored is None:
            copy_into(persistent_buffers(module), store.mean_buffers())
            self._copy_rest(named, store, spanned=varying)
        elif self._groups is not None:
            self._groups.load_state_dict(restored["groups"])
            self._steps_before = restored["groups"]["steps_before"]
            self._skipped_before = restored["groups"].get("skipped_before", 0)
        solver = self.settings.solver
        if self.started["epoch"] == 0 and solver.lr is None and solver.radius is None:
            solver = replace(solver, radius=2.0 * held**0.5)  # a soup
        self._solver = solver
        subspace = self._build(trainer, module, store, share, restored)
        self.optimizer = SubspaceOptimizer(
            named.items(),
            subspace,
            self._solver,
            total_steps=total_steps if self._groups is None else self._groups.steps,
            exchange=share.exchange,
        )
        if restored is not None:
            self.optimizer.load_state_dict(restored["optimizer"])
        self._switch.install_optimizer(self.optimizer)
        if share.gradients_stay:
            self._switch.stop_gradient_sync()
        self._local_buffers = share.gradients_stay or phase.shards_parameters(trainer)
        self._share = share
        if share.text is not None:
            rank_zero_info(share.text)
        data, epoch = self.settings.data, self.started["epoch"]
        rank_zero_info(report.switch_report(self.optimizer, store.names, DATA[data], epoch))
        if self._groups is not None:
            rank_zero_info(report.groups_report(self._groups))
        if data == "val":
            rank_zero_warn(
                "TWACallback(data='val') trains the averaging coefficients on the validation data: "
                "from here on validation metrics are not held out. Judge the result on test data."
            )

    def _build(
        self,
        trainer: Trainer,
        module: LightningModule,
        store: Store,
        share: sharing.Sharing,
        restored: Mapping[str, Any] | None = None,
    ) -> Subspace:
        """The subspace of all candidates or of the current group, with the directions of a
        checkpoint.
        """
        members, start = list(store), None
        if self._groups is not None:
            members = [members[i] for i in self._groups.members]
            put_weighted(module, store, share.columns.whole.specs, self._groups.start)
            start = {name: local_part(p) for name, p in module.named_parameters()}
        passes = 3 if restored is None else 2
        total = passes * share.columns.local.numel
        with progress_bar(trainer, "building the subspace", " columns", total) as tick:
            return build_subspace(
                (candidate.parameters for candidate in members),
                self.settings.subspace,
                device=trainer.strategy.root_device,
                mixing=None if restored is None else restored["mixing"],
                columns=share.columns,
                start=start,
                tick=tick,
            )

    def _copy_rest(self, named: dict[str, nn.Parameter], store: Store, spanned: set[str]) -> None:
        """Parameters that are the same in all candidates: those from files may be others than the
        module's, which nobody will train.
        """
        *_, newest = store
        values = {k: v for k, v in newest.parameters.items() if k not in spanned}
        copy_into({name: local_part(named[name]) for name in values}, values)

    def _total_steps(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the whole phase; the same number when the phase is resumed."""
        per_epoch = phase.steps_per_epoch(trainer)
        if per_epoch is None and self.settings.data == "train":
            per_epoch = phase.steps_for(trainer, self.started["epoch_batches"])
        limits = []
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps - self.started["step"])
        end = phase.max_epochs(trainer) if self.end is None else self.end
        end = self.started.get("stops_at", end)
        if end is not None and per_epoch is not None:
            limits.append((end - self.started["epoch"]) * per_epoch)
        return max(min(limits), 1) if limits else None

    # --- steps

    def after_step(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """After a batch: go on with the next group of candidates where one is due."""
        doubtful, self._doubtful = self._doubtful, []
        _warn_of_missing_gradients(doubtful, module)
        optimizer, groups = self.optimizer, self._groups
        if optimizer is None or groups is None or groups.last:
            return
        if optimizer.steps + optimizer.skipped_steps < groups.steps:
            return
        assert self._switch is not None
        assert self._share is not None
        self._groups = groups.following(optimizer.averaging_weights)
        try:
            subspace = self._build(trainer, module, store, self._share)
        except BaseException:
            self._groups = groups  # as the optimizer, should a checkpoint be written now
            raise
        self._steps_before += optimizer.steps
        self._skipped_before += optimizer.skipped_steps
        self.optimizer = SubspaceOptimizer(
            module.named_parameters(),
            subspace,
            self._solver,
            total_steps=self._groups.steps,
            exchange=self._share.exchange,
        )
        self._switch.replace_optimizer(self.optimizer)

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)`` those of the weights in the model; ``None`` outside of the phase."""
        if self.optimizer is None:
            return None
        weights = self.optimizer.averaging_weights
        return weights if self._groups is None else self._groups.weights(weights)

    def average_buffers(self, module: LightningModule) -> bool:
        """Make floating-point buffers equal on all ranks where DDP does not; every rank calls it.

        Returns:
            Whether it did.
        """
        if self.optimizer is None or not self._local_buffers:
            return False
        buffers = persistent_buffers(module).values()
        mean_over_ranks_(buffer for buffer in buffers if buffer.is_floating_point())
        return True

    # --- the end

    def finish(self, module: LightningModule, store: Store) -> Tensor:
        """Write the average that was learned, where the model does not hold it already.

        Returns:
            Its averaging weights, ``(n, B)``.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        weights = optimizer.averaging_weights
        if self._groups is not None:
            weights = self._groups.result(weights)
        if self._groups is not None or optimizer.parametrization.samples:
            # of the candidates themselves, without the rounding of the basis
            put_weighted(module, store, optimizer.subspace.layout.specs, weights)
        return weights

    def report(self, averaging_weights: Tensor, batchnorm_batches: int | None) -> None:
        """Say what the phase did; see :func:`lightning_twa.report.finish_report`."""
        assert self.optimizer is not None
        lines = report.finish_report(
            self.optimizer,
            averaging_weights,
            self._steps_before + self.optimizer.steps,
            self._skipped_before + self.optimizer.skipped_steps,
            batchnorm_batches,
            self.losses,
            time.perf_counter() - self._began,
        )
        for line in lines:
            rank_zero_info(line)

    def user_training_loader(self, trainer: Trainer) -> Any:
        """The user's prepared training data, whatever is installed now."""
        return (self._switch or phase.TrainerSwitch(trainer)).user_training_loader

    def release(self) -> None:
        """Undo every change to the Trainer. May be called again."""
        if self._switch is not None:
            self._switch.restore()
            self._switch = None
        self._loader = None

    def leave(self, trainer: Trainer) -> None:
        """Undo every change to the Trainer at the start of an epoch, which then trains as usual."""
        loader = self._loader
        self.release()
        self.forget()
        if loader is not None:
            phase.prepare_data(trainer)
        self.request_loader(trainer)

    def forget(self) -> None:
        """Free the basis."""
        self.optimizer = self._groups = None
        self._steps_before = self._skipped_before = 0

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint within the phase holds."""
        state: dict[str, Any] = {"settings": self._fixed_settings()}
        if self._restored is not None:
            state.update(self._restored)
        elif self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
            state["mixing"] = self.optimizer.subspace.mixing
            if self._groups is not None:
                groups = {
                    **self._groups.state_dict(),
                    "steps_before": self._steps_before,
                    "skipped_before": self._skipped_before,
                }
                state["groups"] = groups
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, when the phase is entered.

        Raises:
            ValueError: When the phase was begun with another subspace or solver.
        """
        begun, now = {**LATER_SETTINGS, **state["settings"]}, self._fixed_settings()
        others = [name for name in now if name in begun and begun[name] != now[name]]
        if others:
            raise ValueError(
                "The checkpoint's phase was started with "
                + ", ".join(f"{name}={begun[name]!r}" for name in others)
                + ", but this callback has "
                + ", ".join(f"{name}={now[name]!r}" for name in others)
                + ". Resume with the same settings."
            )
        self._restored = {k: state[k] for k in ("optimizer", "mixing", "groups") if k in state}

    def _fixed_settings(self) -> dict[str, Any]:
        """The settings without which a phase cannot go on as it began."""
        subspace, solver = self.settings.subspace, asdict(self.settings.solver)
        return {
            "data": self.settings.data,
            "basis": subspace.basis,
            "blocks": subspace.blocks,
            "rank": subspace.rank,
            "bits": subspace.bits,
            "parametrization": subspace.parametrization,
            "mask_size": subspace.mask_size,
            "group_size": subspace.group_size,
            "solver": solver.pop("name"),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in solver.items()},
        }


def _warn_of_missing_gradients(names: list[str], module: LightningModule) -> None:
    """After the first batch: hooks of the module may unfreeze until then."""
    named = dict(module.named_parameters())
    frozen = [name for name in names if not named[name].requires_grad]
    if frozen:
        rank_zero_warn(
            f"Parameters that were trained are frozen now ({len(frozen)}, the first is "
            f"{frozen[0]!r}): they are averaged, but the coefficients are trained without their "
            f"gradients. BackboneFinetuning leaves them frozen when a run is resumed after its "
            f"unfreezing; unfreeze them in your module's setup()."
        )


def _known(total_steps: int | None) -> int:
    """What :func:`lightning_twa.checks.check_data` has seen to."""
    assert total_steps is not None
    return total_steps
