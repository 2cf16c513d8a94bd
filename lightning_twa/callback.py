"""The Lightning callback: hooks that hand on what happens. The stages of the run decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_twa.config import (
    CollectConfig,
    Settings,
    SolverConfig,
    StorageConfig,
    SubspaceConfig,
    as_config,
    known_arguments,
)
from lightning_twa.figures import log_figure
from lightning_twa.phases import Event, Run, check_package
from lightning_twa.results import RunResults

__all__ = ["TWACallback", "TWAHooks"]

if TYPE_CHECKING:
    Hooks = Callback
else:
    Hooks = object


class TWAHooks(RunResults, Hooks):
    """Trainable Weight Averaging (Li et al., arXiv 2205.13104v4) for a Lightning ``Trainer``.

    The run collects weights as candidates. In the averaging phase, by default its last steps, it
    trains only the coefficients of their average, by back-propagation through the model, and ends
    with what held-out data say is best. Length and validation are the Trainer's own; the callback
    never lengthens a run. A Trainer takes one: further phases are ``cycles`` of it.

    Args:
        start_epoch: First epoch (0-based) of the phase that trains the coefficients; a float is a
            fraction of ``max_epochs`` or, of a run with ``max_steps`` alone, of ``max_steps``: the
            phase then begins at that optimizer step, within an epoch too. 0 with
            ``CollectConfig.checkpoints``: a soup. ``None``: ``phase_steps`` before the end of the
            run; with ``SolverConfig(name="uniform")`` 0.8.
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
            far, and restore the weights afterwards.
        save_average: ``True``: where checkpointing is on, the finished average is written to
            ``twa.ckpt`` beside the files of the first checkpoint callback (else in
            ``default_root_dir``); ``twa-v1.ckpt``, ... where that is another run's. Or the name of
            a file, or ``False``. It is a Lightning checkpoint, without states of optimizers, that
            can be loaded and tested without this package. See :attr:`average_path`.
        batchnorm_batches: Training batches that BatchNorm statistics are computed over for averaged
            weights. ``None``: those of an epoch for the result, at most 50 for validations before
            it, and at the switch a quarter of the phase's steps, from 8 to 50.
        cycles: Divide the run into so many parts of equal length, and collect and train
            coefficients in each; ``start_epoch`` and ``CollectConfig.start`` count within a part.
            Ordinary training goes on from the learned average. With
            ``SolverConfig(name="uniform")``: periodic SWA.
        start_on_early_stopping: When ``EarlyStopping`` would end the run before ``start_epoch``,
            start the phase instead, if there are two candidates. It takes as many epochs as it
            would have taken, and then the run ends; never later than ``max_epochs``. Without
            ``CollectConfig.start``, candidates are kept from the first epoch on, as many of the
            newest as there would have been.
        phase_steps: Length of the phase in optimizer steps, or as a fraction of the run's. Ordinary
            training goes on until so many are left, within an epoch too (with ``data="val"`` or
            ``"twa"`` to the start of the epoch in which that falls). With ``start_epoch`` as well
            the run ends when the phase has taken them. With neither, 1 % of the run's, at least
            32, at most a thirtieth.
        continue_from: What a finished run goes on from when it is trained on (``fit`` again with
            more ``max_epochs``, in the same Trainer or from its last checkpoint): the average that
            it ended with, or ``"raw"``, the weights that ordinary training ended with, of which a
            copy is kept in memory and in checkpoints. Candidates are then collected anew, and the
            phase comes at ``start_epoch`` of the longer run. ``None``: that is an error.
        heldout: Data, other than those trained on, by which averages are chosen: the phase starts
            from the best that needs no learning, and the best of eight points of its path, or its
            start, is the result. ``"val"``: the validation data, of which ``data="val"`` holds back
            a quarter; ``"twa"``: those of ``twa_dataloader()``; ``"auto"``: the validation data, if
            ``training_step`` takes them; ``None``: nothing is chosen. Compared is its loss in
            evaluation mode, on as many batches as cost no more than the phase.

    Raises:
        ValueError: When an argument is outside its range or two contradict each other.
        TypeError: When a configuration is no mapping of its arguments, or naming an unknown one.
    """

    _run: Run

    @known_arguments("TWACallback")
    def __init__(
        self,
        start_epoch: int | float | None = None,
        data: Literal["train", "val", "twa"] = "train",
        collect: CollectConfig | None = None,
        subspace: SubspaceConfig | None = None,
        solver: SolverConfig | None = None,
        storage: StorageConfig | None = None,
        distribute: Literal["auto", "replicate", "shard"] = "auto",
        validate_average: bool = False,
        save_average: bool | str = True,
        batchnorm_batches: int | None = None,
        cycles: int = 1,
        start_on_early_stopping: bool = False,
        continue_from: Literal["average", "raw"] | None = None,
        phase_steps: int | float | None = None,
        heldout: Literal["auto", "val", "twa"] | None = "auto",
    ) -> None:
        super().__init__()
        self.settings = Settings(
            start_epoch=start_epoch,
            data=data,
            collect=as_config("collect", collect, CollectConfig),
            subspace=as_config("subspace", subspace, SubspaceConfig),
            solver=as_config("solver", solver, SolverConfig),
            storage=as_config("storage", storage, StorageConfig),
            distribute=distribute,
            validate_average=validate_average,
            save_average=save_average,
            batchnorm_batches=batchnorm_batches,
            cycles=cycles,
            start_on_early_stopping=start_on_early_stopping,
            continue_from=continue_from,
            phase_steps=phase_steps,
            heldout=heldout,
        )
        self._run = Run(self.settings, self.state_key)
        self._fitting = False  # in a fit that concerns us
        self._loading: Trainer | None = None  # between on_load_checkpoint and load_state_dict

    def __getstate__(self) -> dict[str, Any]:
        """A copy tells what this one does, and begins anew in a Trainer. Of a finished run it has
        no candidates.
        """
        of_module = {"log", "log_dict"}  # the module's methods, which Lightning puts here
        own = {name: value for name, value in vars(self).items() if name not in of_module}
        return {**own, "_fitting": False, "_loading": None}

    def _tell(self, event: Event, *arguments: Any) -> None:
        if self._fitting:
            self._run.tell(event, *arguments)

    # --- fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings against the Trainer; nothing happens outside ``fit``."""
        if stage == "fit":
            check_package(self, trainer)
            self._run = self._run.of(trainer)
            self._fitting = not trainer.fast_dev_run  # type: ignore[attr-defined]
            self._tell(Event.FIT_BEGINS, trainer, pl_module)
            if self._fitting:
                self._run.watch_loading(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer; prepare a phase that is resumed."""
        self._tell(Event.LOOPS_BEGIN, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings against the data; re-establish a phase that is resumed."""
        self._tell(Event.TRAINING_BEGINS, trainer, pl_module)
        if self._fitting:
            self._run.surround_validations(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch into the phase where it is due."""
        self._tell(Event.EPOCH_BEGINS, trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A finished run does not go on."""
        self._tell(Event.BATCH_BEGINS, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take candidates by optimizer steps; log; finish after the last batch of the run."""
        self._run.look_at(batch)
        self._tell(Event.BATCH_ENDED, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take candidates by epochs; finish where something has stopped the run."""
        self._tell(Event.EPOCH_ENDED, trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the model does not hold the average."""
        if not self._fitting:
            self._run.compare(pl_module, "In trainer.validate()")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Warn where other weights are validated than the average that is to be."""
        if self._fitting and batch_idx == 0:
            self._run.check_validated(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the Trainer back."""
        self._tell(Event.TRAINING_ENDED, trainer, pl_module)
        if self._fitting:
            self._run.bring_files_up_to_date(trainer, pl_module)
            log_figure(trainer, self)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the Trainer back; keep what was learned."""
        self._tell(Event.RAISED, trainer, pl_module)
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer back."""
        if stage == "fit":
            self._tell(Event.FIT_ENDED, trainer, pl_module)
            self._leave()

    def _leave(self) -> None:
        self._fitting = False
        self._run.let_go()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the model does not hold the average."""
        self._run.compare(pl_module, "In trainer.test()")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the model does not hold the average."""
        self._run.compare(pl_module, "In trainer.predict()")

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with; safe for ``torch.load(weights_only=True)``."""
        return self._run.state_dict()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finish a run that was stopped (EarlyStopping) after this callback's last hook; leave out
        of the candidates what the checkpoint's ``state_dict`` holds.
        """
        self._run.complete_checkpoint(trainer, pl_module, checkpoint, self.state_key)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the raw weights where the checkpoint holds an average too. Testing needs a
        checkpoint's weights alone; what this run learned stays.
        """
        own_state = checkpoint.get("callbacks", {}).get(self.state_key)
        self._loading = trainer if own_state else None
        if trainer.state.fn == "fit":
            self._run.meet_checkpoint(trainer, pl_module, checkpoint, own_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; only while fitting.

        Raises:
            ValueError: When the state has another format, or the phase another subspace or solver.
        """
        trainer, self._loading = self._loading, None
        if trainer is None or trainer.state.fn == "fit":
            self._run.load(trainer, state_dict)


class TWACallback(TWAHooks, Callback):
    """For a ``Trainer`` of the package ``lightning``."""

    __doc__ = TWAHooks.__doc__
