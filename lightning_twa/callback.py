"""The Lightning callback: hooks, each a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_twa.candidates import Candidate
from lightning_twa.checks import check_package, check_parameters
from lightning_twa.config import (
    DATA,
    DISTRIBUTE,
    CollectConfig,
    SolverConfig,
    StorageConfig,
    SubspaceConfig,
    as_epoch,
    check_choice,
    check_epoch_or_fraction,
    check_unit_of_steps,
)
from lightning_twa.phase import restores_late
from lightning_twa.report import count as counted
from lightning_twa.run import Run
from lightning_twa.settings import Settings, check_cycles, check_uniform
from lightning_twa.swap import restore_raw_weights

__all__ = ["TWACallback", "TWAHooks"]

if TYPE_CHECKING:
    Hooks = Callback
else:
    Hooks = object


class TWAHooks(Hooks):
    """Trainable Weight Averaging (Li et al., arXiv 2205.13104v4) for a Lightning ``Trainer``.

    The run collects weights as candidates, then, from ``start_epoch`` on, trains only the
    coefficients of their average, by back-propagation through the model, and ends with the learned
    average in the model. Length and validation are the Trainer's own; the callback never lengthens
    a run.

    Args:
        start_epoch: First epoch (0-based) of the phase that trains the coefficients; a float is a
            fraction of ``max_epochs``. 0 with ``CollectConfig.checkpoints``: a soup.
        data: What the coefficients are trained on: ``"train"``, the training data (TWA-t);
            ``"val"``, the validation dataloader, in random order (TWA-v); ``"twa"``, what a
            ``twa_dataloader()`` hook of the module or datamodule returns. ``training_step`` is used
            on all of them.
        collect: When weights are kept as candidates.
        subspace: Basis and coefficient blocks.
        solver: How the coefficients are trained.
        storage: Where candidates are kept.
        distribute: Where several processes keep the directions: ``"replicate"``, all of them on
            each, and a step exchanges the ``k x B`` coefficient gradients; ``"shard"``, those of
            its own columns on each, which takes the memory of one copy over all processes, and a
            step averages ``D`` gradients and gathers ``D`` weights; ``"auto"``, the first where
            it fits into half of the free memory. Parameters that are sharded already (FSDP2) stay
            where they are.
        validate_average: While collecting, validate on the uniform average of the candidates so
            far, and restore the weights afterwards. With BatchNorm, each validation then costs a
            forward pass over the training data.
        cycles: Divide the run into so many parts of equal length, and collect and train
            coefficients in each; ``start_epoch`` and ``CollectConfig.start`` count within a part.
            Ordinary training goes on from the learned average. With
            ``SolverConfig(name="uniform")``: periodic SWA.
        start_on_early_stopping: When ``EarlyStopping`` would end the run before ``start_epoch``,
            start the phase instead, if there are two candidates. It takes as many epochs as it
            would have taken, and then the run ends; never later than ``max_epochs``.

    Raises:
        ValueError: When an argument is outside its range or two contradict each other.
        TypeError: When a configuration is not of its class.
    """

    def __init__(
        self,
        start_epoch: int | float = 0.8,
        data: Literal["train", "val", "twa"] = "train",
        collect: CollectConfig | None = None,
        subspace: SubspaceConfig | None = None,
        solver: SolverConfig | None = None,
        storage: StorageConfig | None = None,
        distribute: Literal["auto", "replicate", "shard"] = "auto",
        validate_average: bool = False,
        cycles: int = 1,
        start_on_early_stopping: bool = False,
    ) -> None:
        super().__init__()
        start_epoch = as_epoch(start_epoch)
        check_epoch_or_fraction("start_epoch", start_epoch)
        check_choice("data", data, tuple(DATA))
        check_choice("distribute", distribute, DISTRIBUTE)
        for name, config, kind in (
            ("collect", collect, CollectConfig),
            ("subspace", subspace, SubspaceConfig),
            ("solver", solver, SolverConfig),
            ("storage", storage, StorageConfig),
        ):
            if config is not None and not isinstance(config, kind):
                raise TypeError(f"{name}={config!r} must be a {kind.__name__}(...) or None.")
        self.settings = Settings(
            start_epoch=start_epoch,
            data=data,
            collect=collect or CollectConfig(),
            subspace=subspace or SubspaceConfig(),
            solver=solver or SolverConfig(),
            storage=storage or StorageConfig(),
            distribute=distribute,
            validate_average=validate_average,
            cycles=cycles,
            start_on_early_stopping=start_on_early_stopping,
        )
        check_cycles(self.settings)
        check_uniform(self.settings)
        check_unit_of_steps(self.settings.subspace, self.settings.solver)
        self._active = False  # between setup("fit") and teardown
        self._restore_wanted = True
        self._restored_late: Trainer | None = None  # between on_load_checkpoint and the state
        self._run = Run(self.settings)

    # --- what a user reads

    @property
    def phase(self) -> Literal["collect", "optimize", "done"]:
        """``"collect"``, then ``"optimize"`` from the switch on, then ``"done"``."""
        return self._run.phase

    @property
    def num_candidates(self) -> int:
        """Number of candidates."""
        return len(self.candidate_names)

    @property
    def candidate_names(self) -> list[str]:
        """``"epoch=3"`` (weights at the end of that 0-based epoch) or ``"step=120"`` (after so many
        optimizer steps), oldest first; before them ``"ema(0.97)"`` and the names of files.
        """
        return self._run.candidate_names

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates that this process holds, in the order of :attr:`candidate_names`. Each has
        a ``name``, and ``parameters`` and ``buffers`` by name, on the CPU. A checkpoint of a
        finished run holds none.
        """
        return list(self._run.store)

    @property
    def block_names(self) -> list[str]:
        """Names of the coefficient blocks; empty before the phase."""
        return list(self._run.block_names)

    @property
    def averaging_weights(self) -> Tensor | None:
        """The learned weights, ``(n, B)`` float64 on the CPU; ``None`` before the phase, of each
        cycle.

        In block ``b`` the model's weights are ``sum_i averaging_weights[i, b] * candidate_i``.
        Columns sum to 1 in the centered bases.
        """
        return self._run.averaging_weights

    @property
    def averaging_path(self) -> Tensor | None:
        """The way of the averaging weights through the last phase, ``(points, n, B)`` float32 on
        the CPU, from the uniform average to what was learned; ``None`` before it, and without
        one. Of a long phase, evenly spaced points.
        """
        return self._run.path.points

    # --- set-up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings against the Trainer; nothing happens outside ``fit``."""
        if stage != "fit":
            return
        check_package(self, trainer)
        if trainer.global_step == 0:  # else the same Trainer goes on with its run
            self._run = Run(self.settings)
        self._restore_wanted = True
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self._active:
            self._run.set_up(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare a phase that is resumed."""
        if not self._active:
            return
        # For configure_optimizers() that returns None Lightning makes an optimizer without groups.
        count = sum(bool(optimizer.param_groups) for optimizer in trainer.optimizers)
        if count != 1:
            raise ValueError(
                f"TWACallback needs exactly one optimizer, but configure_optimizers() gave {count}."
            )
        check_parameters(pl_module)
        if not restores_late(trainer) and self.phase != "collect":
            self._run.prepare_resume(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings against the data; re-establish a phase that is resumed."""
        if not self._active:
            return
        self._run.start(trainer, pl_module)

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch into the phase where it is due."""
        if not self._active:
            return
        self._refuse_to_go_on(trainer)
        self._run.start_epoch(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A finished run that is resumed within an epoch has no start of the epoch."""
        if self._active:
            self._refuse_to_go_on(trainer)

    def _refuse_to_go_on(self, trainer: Trainer) -> None:
        if self._run.finished:
            raise RuntimeError(
                f"The TWA phase of this run was finished, but the Trainer goes on with epoch "
                f"{trainer.current_epoch}. To train further from the averaged weights, load them "
                f"into a new run (load_from_checkpoint, a new Trainer and a new TWACallback)."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take candidates by optimizer steps; log; finish after the last batch of the run."""
        if not self._active:
            return
        if self.phase == "optimize":
            self._log(pl_module)
            self._run.optimization.losses.add(outputs)
        self._run.after_step(trainer, pl_module)
        self._run.finish_if_ending(trainer, pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        optimizer = self._run.optimization.optimizer
        assert optimizer is not None
        values = {"twa/lr": optimizer.last_lr, "twa/coefficient_norm": optimizer.coefficient_norm}
        # A batch size of its own: with training_step(dataloader_iter) Lightning knows none.
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1, prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take candidates by epochs; finish where something has stopped the run."""
        if not self._active:
            return
        if self.phase == "collect":
            self._run.after_epoch(trainer, pl_module)
        self._run.finish_if_ending(trainer, pl_module)
        count = float(self.num_candidates)
        pl_module.log(  # the same on every rank; without sync_dist Lightning warns
            "twa/num_candidates",
            count,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
            prog_bar=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the Trainer back."""
        if not self._active:
            return
        if self.phase == "optimize" or (self.phase == "collect" and self._run.uniform):
            self._run.finish(trainer, pl_module)
        elif self.phase == "collect" and self._run.cycle > 0:
            rank_zero_warn(
                f"Training stopped in part {self._run.cycle + 1} of cycles={self.settings.cycles}, "
                f"before its phase began: ordinary training has moved the weights on from the "
                f"average of part {self._run.cycle}."
            )
        elif self.phase == "collect":
            rank_zero_warn(self._why_never(trainer))
        self._run.release(pl_module)
        if self.phase == "done" and trainer.is_global_zero:
            from lightning_twa.plots import log_figure  # it imports this file

            log_figure(trainer.loggers, self, trainer.global_step)

    def _why_never(self, trainer: Trainer) -> str:
        candidates, start = self.num_candidates, self._run.plan.start_epoch
        found = f"there {'was' if candidates == 1 else 'were'} {counted(candidates, 'candidate')}"
        ordinary = "The weights are those of ordinary training."
        if self._run.had_too_few:
            return (
                f"TWA never ran: {found} at start_epoch={start}, and it needs two. {ordinary} "
                f"Collect earlier, or more often (CollectConfig)."
            )
        text = (
            f"TWA never ran: training stopped after {counted(trainer.current_epoch, 'epoch')} and "
            f"{counted(trainer.global_step, 'optimizer step')}, before start_epoch={start} began "
            f"the phase. {ordinary} Lower start_epoch to run it"
        )
        if self.settings.start_on_early_stopping and candidates < 2:
            text += f", or CollectConfig.start: {found}, and start_on_early_stopping needs two"
        return f"{text}."

    # --- validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish before the last validation; validate the uniform average if asked to."""
        if not self._active or trainer.sanity_checking:
            return
        if not self._run.finish_if_ending(trainer, pl_module):
            self._run.average_buffers(pl_module)
        if self.settings.validate_average and self.phase == "collect":
            self._run.swap_average_in(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self._run.swap_average_out(pl_module)

    # --- the end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the Trainer back."""
        self._run.release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer back."""
        self._run.release(pl_module)
        self._active = False

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with; safe for ``torch.load(weights_only=True)``."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; only while fitting.

        Raises:
            ValueError: When the state has another format, or the phase another subspace or solver.
        """
        if not self._restore_wanted:
            return
        self._run.load_state_dict(state_dict)
        if self._restored_late is not None and self.phase != "collect":
            self._run.prepare_resume(self._restored_late)
        self._restored_late = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finish a run that was stopped (EarlyStopping) after this callback's last hook; leave out
        of the candidates what the checkpoint's ``state_dict`` holds.
        """
        if not self._active:
            return
        finished = self._run.finish_if_ending(trainer, pl_module)
        if finished or self._run.average_buffers(pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        if finished:
            checkpoint["callbacks"][self.state_key] = self.state_dict()
        self._run.complete_state(pl_module, checkpoint["callbacks"].get(self.state_key, {}))
        if self.settings.validate_average:
            self._run.average_in_checkpoint(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the raw weights where the checkpoint holds an average too. Testing needs a
        checkpoint's weights alone; what this run learned stays.
        """
        self._restore_wanted = trainer.state.fn == "fit"
        if self._restore_wanted:
            restore_raw_weights(pl_module, checkpoint)
            own_state = checkpoint.get("callbacks", {}).get(self.state_key)
            if own_state:
                self._run.unfreeze_as_before(pl_module, own_state)
            trained = checkpoint.get("global_step", 0) > 0  # not the learning rate finder's own
            if trained and not own_state:
                rank_zero_info("TWA: the checkpoint holds no candidates; collecting starts here.")
        if self._restore_wanted and restores_late(trainer):
            self._restored_late = trainer


class TWACallback(TWAHooks, Callback):
    """For a ``Trainer`` of the package ``lightning``."""

    __doc__ = TWAHooks.__doc__
