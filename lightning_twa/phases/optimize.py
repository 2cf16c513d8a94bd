"""The phase in which coefficients are trained: its optimizer in the Trainer, step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_twa.candidates import Store, average_buffers_, put_weighted
from lightning_twa.config import DATA, Settings
from lightning_twa.machine import in_common
from lightning_twa.phases import report, span
from lightning_twa.phases.candidate_groups import CandidateGroups
from lightning_twa.phases.guard import guard_step, raise_what_failed
from lightning_twa.phases.parameters import ParameterWatch
from lightning_twa.phases.start import Switch
from lightning_twa.phases.step_watch import StepWatch
from lightning_twa.subspace import Subspace, SubspaceOptimizer
from lightning_twa.trainer import batches_seen, shards_parameters, step_was_taken

__all__ = ["Optimization"]


class Optimization:
    """Trains coefficients in a borrowed Trainer.

    Args:
        settings: The arguments of the callback.

    Attributes:
        switch: What is borrowed, and how it is given back.
        optimizer: While coefficients are trained.
        block_names: Names of the coefficient blocks.
        started: Epoch and optimizer step of the switch, and what its data needs.
        end: Epoch at which the phase ends; ``None`` where only the Trainer ends it.
        losses: Of the phase.
        failed: Whether the phase could not begin, or go on: the model has the uniform average, and
            steps change nothing.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.switch = Switch(settings)
        self.optimizer: SubspaceOptimizer | None = None
        self.block_names: list[str] = []
        self.started: dict[str, Any] = {}
        self.end: int | None = None
        self.losses = report.LossRecord()
        self.failed = False
        self._groups: CandidateGroups | None = None
        self._parameters: ParameterWatch | None = None
        self._choice: span.Choice | None = None
        self._steps_before = 0  # of the groups before the current one
        self._skipped_before = 0
        self._doubtful: list[str] = []  # frozen at the switch, though the user's optimizer has them
        self._began = 0.0
        self._step_watch: StepWatch | None = None
        self._local_buffers = False  # nobody but average_buffers() makes them equal on all ranks

    def enter(
        self,
        trainer: Trainer,
        module: LightningModule,
        store: Store,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the subspace, move the model into it, and let the Trainer, which has been borrowed,
        step the coefficients.

        Args:
            trainer: The Trainer.
            module: The module.
            store: The candidates.
            kept: From :meth:`state_dict`, to go on from.
        """
        self._began, self.losses = time.perf_counter(), report.LossRecord()
        choice = span.choose(self.settings, trainer, module, store, self.started, self.end)
        self._choice, self._groups = choice, choice.groups
        self.block_names = list(choice.share.columns.whole.block_names)
        if kept is None:
            self._doubtful = choice.doubtful
            span.prepare_model(module, store, choice.spanned)
        elif self._groups is not None:
            self._groups.load_state_dict(kept["groups"])
            self._steps_before = kept["groups"]["steps_before"]
            self._skipped_before = kept["groups"].get("skipped_before", 0)
        subspace = self._build(trainer, module, store, None if kept is None else kept["mixing"])
        self.optimizer = self._make_optimizer(module, subspace)
        if kept is not None:
            self.optimizer.load_state_dict(kept["optimizer"])
        guard_step(self.optimizer)
        self._step_watch = StepWatch(self.optimizer)
        outputs = self.optimizer.param_groups[0]["params"]
        self.switch.step_with(self.optimizer, outputs, gradients_stay=choice.share.gradients_stay)
        self._local_buffers = choice.share.gradients_stay or shards_parameters(trainer)
        self._go_to_next_group(trainer, module, store)  # where it was saved before follow_batch()
        self._tell_what_begins(store)

    def _tell_what_begins(self, store: Store) -> None:
        assert self._choice is not None
        assert self.optimizer is not None
        if self._choice.share.text is not None:
            rank_zero_info(self._choice.share.text)
        data = self.settings.data
        rank_zero_info(report.switch_report(self.optimizer, store.names, DATA[data], self.started))
        if self._groups is not None:
            rank_zero_info(report.groups_report(self._groups))
        if data == "val":
            rank_zero_warn(
                "TWACallback(data='val') trains the averaging coefficients on the validation data: "
                "from here on validation metrics are not held out. Judge the result on test data."
            )

    def _build(
        self, trainer: Trainer, module: LightningModule, store: Store, mixing: Tensor | None = None
    ) -> Subspace:
        assert self._choice is not None
        return span.build(
            self.settings, trainer, module, store, self._choice.share, self._groups, mixing
        )

    def _make_optimizer(self, module: LightningModule, subspace: Subspace) -> SubspaceOptimizer:
        assert self._choice is not None
        self._parameters = ParameterWatch(module, subspace.layout)
        steps = self._choice.total_steps if self._groups is None else self._groups.steps
        return SubspaceOptimizer(
            module.named_parameters(),
            subspace,
            self._choice.solver,
            total_steps=steps,
            exchange=self._choice.share.exchange,
        )

    # --- steps

    def look_before_batch(self, trainer: Trainer) -> None:
        """At the start of an epoch others may have put another optimizer into the Trainer, or other
        weights into the model: those of the best checkpoint, say.
        """
        self.switch.follow_optimizer()
        if self.optimizer is not None and batches_seen(trainer) <= 1:
            self.optimizer.write_parameters()

    def follow_batch(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """After a batch: go on with the next group of candidates where one is due.

        Raises:
            Exception: What the optimizer's own work has failed with.
        """
        raise_what_failed(self.optimizer)
        if self._parameters is not None:
            self._parameters.look()
        doubtful, self._doubtful = self._doubtful, []
        _warn_of_missing_gradients(doubtful, module)
        if self._step_watch is not None and step_was_taken(trainer):
            self._step_watch.look(module)
        self._go_to_next_group(trainer, module, store)

    def _go_to_next_group(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """Go on with the next group of candidates where it is due."""
        optimizer, groups = self.optimizer, self._groups
        if optimizer is None or groups is None or groups.last:
            return
        if optimizer.steps + optimizer.skipped_steps < groups.steps:
            return
        self._groups = groups.following(optimizer.averaging_weights)
        try:
            subspace = self._build(trainer, module, store)
        except BaseException:
            self._groups = groups  # as the optimizer, should a checkpoint be written now
            raise
        self._steps_before += optimizer.steps
        self._skipped_before += optimizer.skipped_steps
        self.optimizer = self._make_optimizer(module, subspace)
        guard_step(self.optimizer)
        self._step_watch = StepWatch(self.optimizer)
        self.switch.step_next(self.optimizer, self.optimizer.param_groups[0]["params"])

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
        average_buffers_(module)
        return True

    # --- the end

    def put_result(self, module: LightningModule, store: Store) -> Tensor:
        """Write the average that was learned, where the model does not hold it already.

        Returns:
            Its averaging weights, ``(n, B)``.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        weights = optimizer.averaging_weights
        if self._groups is not None:
            weights = self._groups.result(weights)
        replaced = self._parameters is not None and self._parameters.replaced_in(module)
        optimizer.write_parameters()  # nothing else than what the coefficients say
        if self._groups is not None or optimizer.parametrization.samples or replaced:
            # of the candidates themselves, without the rounding of the basis
            try:
                with in_common():
                    put_weighted(module, store, optimizer.subspace.layout.specs, weights)
            except Exception as error:  # a file that has gone meanwhile, say
                optimizer.write_parameters()
                now = self.averaging_weights
                assert now is not None
                weights = now
                rank_zero_warn(
                    f"The average that was learned could not be put together from the candidates "
                    f"({type(error).__name__}: {error}). The model has what the phase ended with"
                    + (", its last group's." if self._groups is not None else ".")
                )
        return weights

    def tell_what_was_done(self, averaging_weights: Tensor, batchnorm_batches: int | None) -> None:
        """See :func:`lightning_twa.phases.report.finish_report`."""
        assert self.optimizer is not None
        lines = report.finish_report(
            self.optimizer,
            averaging_weights,
            self._steps_before + self.optimizer.steps,
            None if self._choice is None else self._choice.total_steps,
            self._skipped_before + self.optimizer.skipped_steps,
            batchnorm_batches,
            self.losses,
            time.perf_counter() - self._began,
        )
        for line in lines:
            rank_zero_info(line)

    def stand_still(self, trainer: Trainer) -> None:
        """Free the basis; the model keeps the weights that it has until the run ends."""
        self.forget()
        self.failed = True
        self.switch.step_nothing(trainer)

    def forget(self) -> None:
        """Free the basis."""
        self.failed = False
        self._parameters = self._step_watch = None
        self.optimizer = self._groups = self._choice = None
        self._steps_before = self._skipped_before = 0

    def state_dict(self) -> dict[str, Any]:
        """What the phase goes on from: coefficients, the solver's state, directions, groups."""
        assert self.optimizer is not None
        state = {
            "optimizer": self.optimizer.state_dict(),
            "mixing": self.optimizer.subspace.mixing,
        }
        if self._groups is not None:
            state["groups"] = {
                **self._groups.state_dict(),
                "steps_before": self._steps_before,
                "skipped_before": self._skipped_before,
            }
        return state


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
