"""The Lightning callback: hooks, each a few lines."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_twa import phase, report
from lightning_twa.batchnorm import reestimate, tracked_batch_norms
from lightning_twa.candidates import MemoryStore, persistent_buffers
from lightning_twa.config import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    check_epoch_or_fraction,
    check_unit_of_steps,
)
from lightning_twa.distributed import all_ranks
from lightning_twa.schedule import CollectPlan, check_enough_candidates, resolve_plan
from lightning_twa.subspace import SubspaceOptimizer, build_subspace

__all__ = ["TWACallback"]

FORMAT_VERSION = 1
DATA = {
    "train": "the training data",
    "val": "the validation data",
    "twa": "the data of twa_dataloader()",
}
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
UNSUPPORTED = ("XLAStrategy", "SingleDeviceXLAStrategy")


class TWACallback(Callback):
    """Trainable Weight Averaging (Li et al., arXiv 2205.13104v4) for a Lightning ``Trainer``.

    The run collects weights as candidates, then, from ``start_epoch`` on, trains only the
    coefficients of their average, by back-propagation through the model, and ends with the learned
    average in the model. Number of epochs and validation are the Trainer's own; the callback never
    lengthens a run.

    Args:
        start_epoch: First epoch (0-based) of the phase that trains the coefficients; a float is a
            fraction of ``max_epochs``.
        data: What the coefficients are trained on: ``"train"``, the training data (TWA-t);
            ``"val"``, the validation dataloader, in random order (TWA-v); ``"twa"``, what a
            ``twa_dataloader()`` hook of the module or datamodule returns. ``training_step`` is used
            on all of them.
        collect: When weights are kept as candidates.
        subspace: Basis and coefficient blocks.
        solver: How the coefficients are trained.
        validate_average: While collecting, validate on the uniform average of the candidates so
            far, and restore the weights afterwards. With BatchNorm, each validation then costs a
            forward pass over the training data.

    Raises:
        ValueError: When an argument is outside its range or two contradict each other.
    """

    def __init__(
        self,
        start_epoch: int | float = 0.8,
        data: Literal["train", "val", "twa"] = "train",
        collect: CollectConfig | None = None,
        subspace: SubspaceConfig | None = None,
        solver: SolverConfig | None = None,
        validate_average: bool = False,
    ) -> None:
        super().__init__()
        check_epoch_or_fraction("start_epoch", start_epoch)
        if data not in DATA:
            raise ValueError(f"Invalid data={data!r}. Must be one of {', '.join(map(repr, DATA))}.")
        self.start_epoch = start_epoch
        self.data = data
        self.collect = collect or CollectConfig()
        self.subspace = subspace or SubspaceConfig()
        self.solver = solver or SolverConfig()
        self.validate_average = validate_average
        check_unit_of_steps(self.subspace, self.solver)
        self._restore_wanted = True
        self._reset()

    def _reset(self) -> None:
        """Forget a run."""
        self._active = False
        self._phase: Literal["collect", "optimize", "done"] = "collect"
        self._plan: CollectPlan | None = None
        self._store = MemoryStore(self.collect.max_candidates)
        self._loader: Any = None
        self._switch: phase.TrainerSwitch | None = None
        self._optimizer: SubspaceOptimizer | None = None
        self._started: dict[
            str, int
        ] = {}  # epoch, optimizer step and steps per epoch of the switch
        self._restored: dict[str, Any] | None = None
        self._raw: dict[str, Tensor] | None = None
        self._epoch_batches: int | None = None
        self._averaging_weights: Tensor | None = None
        self._block_names: list[str] = []

    # --- what a user reads

    @property
    def phase(self) -> Literal["collect", "optimize", "done"]:
        """``"collect"``, then ``"optimize"`` from the switch on, then ``"done"``."""
        return self._phase

    @property
    def num_candidates(self) -> int:
        """Number of candidates held."""
        return len(self._store)

    @property
    def candidate_names(self) -> list[str]:
        """``"epoch=3"`` (weights at the end of that epoch) or ``"step=120"``, oldest first."""
        return self._store.names

    @property
    def block_names(self) -> list[str]:
        """Names of the coefficient blocks; empty before the phase."""
        return list(self._block_names)

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)`` float64: the model's weights are ``sum_i averaging_weights[i, b] *
        candidate_i`` in block ``b``. Columns sum to 1 in the centered bases. ``None`` before the
        phase.
        """
        if self._optimizer is not None:
            return self._optimizer.averaging_weights
        return self._averaging_weights

    # --- set-up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings against the Trainer; nothing happens outside ``fit``."""
        if stage != "fit":
            return
        if trainer.global_step == 0:
            self._reset()
        self._active = not trainer.fast_dev_run
        if not self._active:
            return
        names = phase.strategy_names(trainer)
        if not names & set(STRATEGIES) or names & set(UNSUPPORTED):
            raise ValueError(
                f"TWACallback does not support {type(trainer.strategy).__name__}. Use one device "
                f"or "
                f"strategy='ddp' (supported: {', '.join(STRATEGIES)})."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "TWACallback needs automatic optimization: with automatic_optimization=False, and "
                "with "
                "several optimizers, the module steps its own optimizers and the phase could not "
                "replace "
                "them. Average the weights in your loop with build_subspace() and "
                "SubspaceOptimizer."
            )
        self._plan = resolve_plan(self.start_epoch, self.collect, phase.max_epochs(trainer))
        if self.data == "val" and not phase.has_validation_data(trainer):
            raise ValueError(
                "TWACallback(data='val') trains the coefficients on the validation data, but there "
                "is "
                "none. Pass val_dataloaders to fit, define val_dataloader(), or use data='train'."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When resuming inside the phase, its data must be there before the loops start."""
        if not self._active:
            return
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"TWACallback needs exactly one optimizer, but configure_optimizers() gave "
                f"{len(trainer.optimizers)}."
            )
        if self._phase == "optimize":
            self._switch = phase.TrainerSwitch(trainer)
            self._request_loader(trainer)
            if self._loader is not None:
                each_epoch = bool(self._started["validates_each_epoch"])
                self._switch.install_loader(
                    self._loader, set_up=False, validate_each_epoch=each_epoch
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that need the data's length; re-establishes the phase when resuming."""
        if not self._active or self._phase == "done":
            return
        if self._phase == "optimize":
            self._enter(trainer, pl_module)
            return
        plan = self._require_plan()
        if phase.at_epoch_start(trainer) and plan.takes_epoch_end(trainer.current_epoch - 1):
            # Resumed from a checkpoint of the last batch: that epoch's end is not run again.
            self._add(pl_module, f"epoch={trainer.current_epoch - 1}")
        ahead = plan.count_ahead(
            trainer.current_epoch, trainer.global_step, phase.steps_per_epoch(trainer)
        )
        check_enough_candidates(plan, None if ahead is None else ahead + len(self._store))
        self._request_loader(trainer)
        self._check_length(trainer)
        if phase.at_epoch_start(trainer):
            self._enter_if_due(trainer, pl_module)

    def _request_loader(self, trainer: Trainer) -> None:
        """Get the data of the phase now, so that what is wrong with it shows before training."""
        if self.data == "val":
            loader = phase.validation_loader(trainer)
            if isinstance(loader, (list, tuple, dict)):
                if len(loader) != 1:
                    raise ValueError(
                        f"TWACallback(data='val') needs one validation dataloader, but there are "
                        f"{len(loader)}. Return the one to use from a twa_dataloader() hook and "
                        f"pass "
                        f"data='twa'."
                    )
                loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
            self._loader = phase.shuffled(loader)
        elif self.data == "twa":
            self._loader = phase.hook_loader(trainer, "twa_dataloader")
            if self._loader is None:
                raise ValueError(
                    "TWACallback(data='twa') needs a twa_dataloader() hook on the LightningModule "
                    "or "
                    "LightningDataModule, but neither has one or it returned None. Define it, or "
                    "use "
                    "data='train' or data='val'."
                )

    def _check_length(self, trainer: Trainer) -> None:
        """A schedule that ends needs to know the number of steps."""
        known = self.solver.lr is not None and self.solver.schedule == "constant"
        epochs, steps = phase.max_epochs(trainer), trainer.max_steps
        sized = self.data == "train" or phase.has_length(self._loader)
        if not known and steps == -1 and (epochs is None or not sized):
            raise ValueError(
                f"The length of the phase is not known (max_epochs={trainer.max_epochs}, max_steps="
                f"{steps}, data={self.data!r}), but SolverConfig.schedule={self.solver.schedule!r} "
                f"with "
                f"radius={self.solver.radius} needs it. Set max_epochs or max_steps, or use "
                f"SolverConfig(schedule='constant', lr=...)."
            )

    def _require_plan(self) -> CollectPlan:
        assert self._plan is not None, "setup() comes before every training hook"
        return self._plan

    # --- collecting

    def _add(self, pl_module: LightningModule, name: str) -> None:
        if name not in self._store.names:
            self._store.add(pl_module, name)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch into the phase where it is due."""
        if not self._active:
            return
        if self._phase == "done":
            raise RuntimeError(
                f"The TWA phase of this run was finished, but the Trainer goes on with epoch "
                f"{trainer.current_epoch}. To train further from the averaged weights, load them "
                f"into a new "
                f"run (load_from_checkpoint, a new Trainer and a new TWACallback)."
            )
        self._enter_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take candidates by optimizer step; log; finish after the last batch of the run."""
        if not self._active:
            return
        if self._phase == "collect" and phase.step_was_taken(trainer):
            if self._require_plan().takes_step(trainer.current_epoch, trainer.global_step):
                self._add(pl_module, f"step={trainer.global_step}")
        elif self._phase == "optimize":
            assert self._optimizer is not None
            pl_module.log_dict(
                {
                    "twa/lr": float(self._optimizer.param_groups[0]["lr"]),
                    "twa/coefficient_norm": self._optimizer.coefficient_norm,
                },
                on_step=True,
                on_epoch=False,
            )
            self._finish_if_ending(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take candidates by epoch; finish where something has stopped the run."""
        if not self._active:
            return
        if self._phase == "collect":
            self._epoch_batches = phase.batches_seen(trainer)
            if self._require_plan().takes_epoch_end(trainer.current_epoch):
                self._add(pl_module, f"epoch={trainer.current_epoch}")
        elif self._phase == "optimize":
            self._finish_if_ending(trainer, pl_module)
        pl_module.log(
            "twa/num_candidates", float(self.num_candidates), on_step=False, on_epoch=True
        )

    # --- the phase

    def _enter_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan = self._require_plan()
        if self._phase != "collect" or trainer.current_epoch < plan.start_epoch:
            return
        if len(self._store) < 2:
            # Only data without a length gets here: otherwise on_train_start has seen it coming.
            rank_zero_warn(
                f"TWA needs at least two candidates, but collecting {plan.describe()} gave "
                f"{len(self._store)}. Ordinary training goes on."
            )
            return
        self._switch = phase.TrainerSwitch(trainer)
        self._started = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        if self._loader is not None:
            self._switch.install_loader(self._loader, set_up=True)
        self._started["validates_each_epoch"] = int(self._switch.validates_each_epoch)
        self._enter(trainer, pl_module)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the subspace, move the model to it, and let the Trainer step the coefficients."""
        assert self._switch is not None
        named = dict(pl_module.named_parameters())
        optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        subspace = build_subspace(
            (candidate.parameters for candidate in self._store),
            self.subspace,
            names=self._store.varying(also={n for n, p in named.items() if id(p) in optimized}),
            device=trainer.strategy.root_device,
            mixing=None if self._restored is None else self._restored["mixing"],
        )
        self._optimizer = SubspaceOptimizer(
            named.items(), subspace, self.solver, total_steps=self._total_steps(trainer)
        )
        self._block_names = list(subspace.layout.block_names)
        if self._restored is not None:
            self._optimizer.load_state_dict(self._restored["optimizer"])
            self._restored = None
        else:
            _copy_into(persistent_buffers(pl_module), self._store.mean_buffers())
        self._switch.install_optimizer(self._optimizer)
        self._phase = "optimize"
        rank_zero_info(
            report.switch_report(
                self._optimizer, self._store.names, DATA[self.data], self._started["epoch"]
            )
        )
        if self.data == "val":
            rank_zero_warn(
                "TWACallback(data='val') trains the averaging coefficients on the validation data: "
                "from "
                "here on validation metrics are not held out. Judge the result on test data."
            )

    def _total_steps(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the whole phase, the same when it is resumed."""
        by_steps = None
        if trainer.max_steps != -1:
            by_steps = trainer.max_steps - self._started["step"]
        epochs = phase.max_epochs(trainer)
        per_epoch = phase.steps_per_epoch(trainer)
        if per_epoch is None and self.data == "train":
            per_epoch = phase.steps_for(trainer, self._started.get("batches", self._epoch_batches))
        by_epochs = None
        if epochs is not None and per_epoch is not None:
            by_epochs = (epochs - self._started["epoch"]) * per_epoch
        known = [steps for steps in (by_steps, by_epochs) if steps is not None]
        return max(min(known), 1) if known else None

    def _finish_if_ending(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._phase == "optimize" and phase.run_is_ending(trainer):
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the learned average complete, before the last validation and the last checkpoint."""
        assert self._optimizer is not None
        batches = self._reestimate_batchnorm(trainer, pl_module)
        self._averaging_weights = self._optimizer.averaging_weights
        self._phase = "done"
        first, *advice = report.finish_report(self._optimizer, batches)
        rank_zero_info(first)
        for line in advice:
            rank_zero_warn(line)

    def _reestimate_batchnorm(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        """Returns the number of batches, ``None`` where there is nothing to do or it was not "
        "possible.
        """
        training = phase.modules_in_training(trainer, pl_module)
        layers = tracked_batch_norms(pl_module, training)
        if not layers:
            return None
        switch = self._switch or phase.TrainerSwitch(trainer)
        loader = switch.user_training_loader()
        limit = phase.loader_batches(loader)
        if limit is None:
            limit = max(self._epoch_batches or 0, phase.batches_seen(trainer))
        problem: Exception | None = None

        def forward() -> int:
            nonlocal problem
            batches = 0
            try:
                batches = phase.forward_training_data(trainer, pl_module, loader, training, limit)
            except (
                Exception
            ) as error:  # a training_step that needs gradients, say: keep the average
                problem = error
            device = trainer.strategy.root_device
            return batches if all_ranks(problem is None and batches > 0, device) else 0

        batches = reestimate(layers, forward)
        if batches == 0:
            reason = f"{type(problem).__name__}: {problem}" if problem else "there was no batch"
            rank_zero_warn(
                f"BatchNorm statistics could not be re-estimated for the averaged weights "
                f"({reason}); "
                f"they are left as training had them. Re-estimate them with "
                f"torch.optim.swa_utils.update_bn before you use the model."
            )
            return None
        return batches

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the Trainer back."""
        if not self._active:
            return
        if self._phase == "optimize":
            self._finish(trainer, pl_module)
        elif self._phase == "collect":
            rank_zero_warn(
                f"TWA never ran: training stopped in epoch {trainer.current_epoch} after "
                f"{trainer.global_step} optimizer steps, before start_epoch="
                f"{self._require_plan().start_epoch} began the phase. The weights are those of "
                f"ordinary "
                f"training. Lower start_epoch to run it."
            )
        self._release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the Trainer back."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer back."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        """Undo every change to Trainer and weights; keep what was learned."""
        self._swap_out(pl_module)
        if self._switch is not None:
            self._switch.restore()
            self._switch = None
        self._loader = None
        if self._phase == "done":
            self._optimizer = None  # frees the basis

    # --- validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish before the last validation; validate the average if asked to."""
        if not self._active or trainer.sanity_checking:
            return
        self._finish_if_ending(trainer, pl_module)
        if self.validate_average and self._phase == "collect" and len(self._store) > 0:
            state = {**dict(pl_module.named_parameters()), **persistent_buffers(pl_module)}
            self._raw = {name: tensor.detach().clone() for name, tensor in state.items()}
            _copy_into(state, dict(self._store.mean_parameters()))
            _copy_into(state, self._store.mean_buffers())
            self._reestimate_batchnorm(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self._swap_out(pl_module)

    def _swap_out(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy_into(
                {**dict(pl_module.named_parameters()), **persistent_buffers(pl_module)}, self._raw
            )
            self._raw = None

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with; empty before the first candidate. Safe for ``weights_only``."""
        if self._phase == "collect" and len(self._store) == 0:
            return {}
        state: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "phase": self._phase,
            "epoch_batches": self._epoch_batches,
            "candidate_names": self._store.names,
        }
        if self._phase != "done":
            state["candidates"] = self._store.state_dict()
        weights = self.averaging_weights
        if weights is not None:
            state.update(averaging_weights=weights, block_names=self.block_names)
        if self._phase == "optimize":
            if self._optimizer is not None:
                state["optimizer"] = self._optimizer.state_dict()
                state["mixing"] = self._optimizer.subspace.mixing
            elif self._restored is not None:  # saved between restoring and the first batch
                state.update(optimizer=self._restored["optimizer"], mixing=self._restored["mixing"])
            state["started"] = dict(self._started)
            state["subspace"] = {"basis": self.subspace.basis, "blocks": self.subspace.blocks}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; only when the Trainer fits."""
        if not self._restore_wanted:
            return
        version = state_dict["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint holds TWACallback state of format_version={version}, this version "
                f"of "
                f"lightning-twa reads {FORMAT_VERSION}. Use the version that wrote it."
            )
        self._phase = state_dict["phase"]
        self._epoch_batches = state_dict["epoch_batches"]
        self._store = MemoryStore(self.collect.max_candidates)
        self._store.load_state_dict(state_dict.get("candidates", []))
        self._averaging_weights = state_dict.get("averaging_weights")
        self._block_names = list(state_dict.get("block_names", []))
        if self._phase == "optimize":
            written = state_dict["subspace"]
            now = {"basis": self.subspace.basis, "blocks": self.subspace.blocks}
            if written != now:
                raise ValueError(
                    f"The checkpoint's phase was started with SubspaceConfig {written}, but this "
                    f"callback "
                    f"has {now}. Resume with the same settings."
                )
            self._started = dict(state_dict["started"])
            self._restored = {k: state_dict[k] for k in ("optimizer", "mixing")}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The user's optimizer states stay where a run without this callback looks for them."""
        if self._switch is not None and self._switch.user_optimizers:
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = self._switch.user_optimizer_states()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Validate, test and predict use the weights alone: this run's state must survive them."""
        self._restore_wanted = trainer.state.fn == "fit"


@torch.no_grad()
def _copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)
