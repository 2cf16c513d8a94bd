"""The phase in which coefficients are trained: its optimizer in the Trainer, step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import Store, average_buffers_
from lightning_twa.config import Settings
from lightning_twa.machine import warn
from lightning_twa.phases import report, span
from lightning_twa.phases.cached import CachedSubspace
from lightning_twa.phases.candidate_groups import CandidateGroups
from lightning_twa.phases.guard import guard_step, raise_what_failed
from lightning_twa.phases.parameters import ParameterWatch
from lightning_twa.phases.selection import Selection
from lightning_twa.phases.start import Switch
from lightning_twa.phases.step_watch import StepWatch
from lightning_twa.phases.written import WrittenWeights
from lightning_twa.subspace import Subspace, SubspaceOptimizer, in_float64
from lightning_twa.trainer import BatchWatch, batches_seen, shards_parameters, step_was_taken

__all__ = ["Optimization"]


class Optimization:
    """Trains coefficients in a borrowed Trainer.

    Args:
        settings: The arguments of the callback.
        batches: Whether hooks change batches.

    Attributes:
        selection: What held-out data say.
        switch: What is borrowed, and how it is given back.
        optimizer: While coefficients are trained.
        block_names: Names of the coefficient blocks.
        started: Epoch and optimizer step of the switch, and what its data needs.
        end: Epoch at which the phase ends; ``None`` where only the Trainer ends it.
        groups: Groups of candidates; ``None`` where all span one subspace.
        parameters: Whether somebody replaces those that are trained.
        choice: What the phase is trained with.
        cached: Files of the subspace, while there is one.
        steps_before: Of the groups before the current one.
        skipped_before: Those of them without effect.
        began: When it did, by the clock.
        failed: Whether the phase could not begin, or go on: the model has the uniform average, and
            steps change nothing.
    """

    def __init__(self, settings: Settings, batches: BatchWatch | None = None) -> None:
        self.settings = settings
        self.selection = Selection(settings, batches or BatchWatch())
        self.switch = Switch(settings)
        self.optimizer: SubspaceOptimizer | None = None
        self.block_names: list[str] = []
        self.started: dict[str, Any] = {}
        self.end: int | None = None
        self.failed = False
        self.groups: CandidateGroups | None = None
        self.parameters: ParameterWatch | None = None
        self.choice: span.Choice | None = None
        self.cached: CachedSubspace | None = None
        self.steps_before = self.skipped_before = 0
        self._doubtful: list[str] = []  # frozen at the switch, though the user's optimizer has them
        self.began = 0.0
        self._step_watch: StepWatch | None = None
        self._written: WrittenWeights | None = None  # until the next batch
        self._origin: Tensor | None = None  # selection.origin, where the coefficients are
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
        self.began = time.perf_counter()
        self.switch.let_optimizer_rest()
        choice = span.choose(self.settings, trainer, module, store, self.started, self.end)
        self.choice, self.groups = choice, choice.groups
        self.cached = CachedSubspace(self.settings, trainer, store, choice.share)
        self.block_names = list(choice.share.columns.whole.block_names)
        if kept is None:
            self._doubtful = choice.doubtful
            soup = self.started["step"] == 0
            span.prepare_model(module, store, choice.spanned, self.settings.collect, soup=soup)
        whole = choice.share.columns.whole
        total, held_back = choice.total_steps, self.switch.held_back
        held = None if kept is None else kept.get("heldout", {"fixed": {}})
        self.selection.begin(
            trainer, module, store, whole.specs, whole.num_blocks, total, held_back, held
        )
        if self.groups is not None and self.selection.origin is not None:
            self.groups.start = self.selection.origin
        if kept is not None and self.groups is not None:
            self.groups.load_state_dict(kept["groups"])
            self.steps_before = kept["groups"]["steps_before"]
            self.skipped_before = kept["groups"].get("skipped_before", 0)
        subspace = self._build(trainer, module, store, kept)
        state = None if kept is None else kept["optimizer"]
        self.optimizer = self._make_optimizer(module, subspace, state)
        self._origin = _placed(self.selection.origin, self.optimizer.raw)
        guard_step(self.optimizer)
        self._step_watch = StepWatch(self.optimizer)
        outputs = self.optimizer.param_groups[0]["params"]
        self.switch.step_with(self.optimizer, outputs, gradients_stay=choice.share.gradients_stay)
        self._local_buffers = choice.share.gradients_stay or shards_parameters(trainer)
        self.measure(trainer, module)
        self._go_to_next_group(trainer, module, store)  # where it was saved before follow_batch()
        chosen = self.selection.comparison.chosen if self.selection.chose else None
        report.tell_what_begins(self, module, store.names, chosen)

    def _build(
        self,
        trainer: Trainer,
        module: LightningModule,
        store: Store,
        kept: Mapping[str, Any] | None = None,
    ) -> Subspace:
        """The subspace to train in: of a phase that goes on from its file, where there is one."""
        choice, groups, origin = self.choice, self.groups, self.selection.origin
        assert choice is not None
        assert self.cached is not None
        names = [store.names[i] for i in groups.members] if groups is not None else store.names
        build = partial(
            span.build, self.settings, trainer, module, store, choice.share, groups, origin
        )
        at_mean = groups is None and origin is None
        return self.cached.read_or_build(kept, names, build, starts_at_mean=at_mean)

    def _make_optimizer(
        self, module: LightningModule, subspace: Subspace, state: dict[str, Any] | None = None
    ) -> SubspaceOptimizer:
        assert self.choice is not None
        self.parameters = ParameterWatch(module, subspace.layout)
        steps = self.choice.total_steps if self.groups is None else self.groups.steps
        optimizer = SubspaceOptimizer(
            module.named_parameters(),
            subspace,
            span.with_radius(self.choice.solver, chosen=self.selection.origin is not None),
            total_steps=steps,
            exchange=self.choice.share.exchange,
            state=state,
        )
        self._written = WrittenWeights(optimizer, module.device)
        return optimizer

    # --- steps

    def look_before_batch(self, trainer: Trainer) -> None:
        """At the start of an epoch, or of a run that goes on within one, others may have put
        another optimizer into the Trainer, or other weights into the model: of the best checkpoint.
        """
        self.switch.follow_optimizer()
        written, self._written = self._written, None
        if self.optimizer is None or (written is None and batches_seen(trainer) > 1):
            return
        if written is None or not written.stay():
            self.optimizer.write_parameters()

    def follow_batch(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """After a batch: go on with the next group of candidates where one is due.

        Raises:
            Exception: What the optimizer's own work has failed with.
        """
        raise_what_failed(self.optimizer, waits=batches_seen(trainer) <= 1)
        if self.parameters is not None:
            self.parameters.look()
        doubtful, self._doubtful = self._doubtful, []
        _warn_of_missing_gradients(doubtful, module)
        if self._step_watch is not None and step_was_taken(trainer):
            self._step_watch.look(module)
        self.measure(trainer, module)
        self._go_to_next_group(trainer, module, store)

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase so far, those without effect too."""
        assert self.optimizer is not None
        return self.optimizer.attempts + self.steps_before + self.skipped_before

    def measure(self, trainer: Trainer, module: LightningModule, *, at_end: bool = False) -> None:
        """Compare what is in the model on held-out data, where that is due."""
        if self.optimizer is not None:
            point = partial(_point, self)
            self.selection.look(trainer, module, self.steps, point, at_end=at_end)

    def _go_to_next_group(self, trainer: Trainer, module: LightningModule, store: Store) -> None:
        """Go on with the next group of candidates where it is due."""
        optimizer, groups = self.optimizer, self.groups
        if optimizer is None or groups is None or groups.last:
            return
        if optimizer.attempts < groups.steps:
            return
        self.groups = groups.following(in_float64(optimizer.averaging_weights).cpu())
        optimizer.subspace.release()  # there may be no room for two
        try:
            subspace = self._build(trainer, module, store)
        except BaseException:
            self.groups = groups  # as the optimizer, should a checkpoint be written now
            raise
        self.steps_before += optimizer.steps
        self.skipped_before += optimizer.skipped_steps
        self.optimizer = self._make_optimizer(module, subspace)
        guard_step(self.optimizer)
        self._step_watch = StepWatch(self.optimizer)
        self.switch.step_next(self.optimizer, self.optimizer.param_groups[0]["params"])

    @property
    def averaging_weights(self) -> Tensor | None:
        """``(n, B)`` float64 on the CPU, of the weights in the model; ``None`` without a phase."""
        return None if self.weights_there is None else in_float64(self.weights_there).cpu()

    @property
    def weights_there(self) -> Tensor | None:
        """The same on the device of the coefficients, which nobody waits for."""
        now = None if self.optimizer is None else self.optimizer.averaging_weights
        if now is not None and self.groups is not None:
            return self.groups.weights(now)
        return now if now is None or self._origin is None else self._origin + now

    def average_buffers(self, module: LightningModule) -> bool:
        """Make floating-point buffers equal on all ranks where DDP does not; every rank calls it.

        Returns:
            Whether it did.
        """
        if self.optimizer is None or not self._local_buffers:
            return False
        average_buffers_(module)
        return True

    def stand_still(self, trainer: Trainer) -> None:
        """Free the basis; the model keeps the weights that it has until the run ends."""
        self.forget()
        self.failed = True
        self.switch.step_nothing(trainer)

    def forget(self) -> None:
        """Free the basis."""
        self.failed = False
        self.parameters = self._step_watch = self._written = self._origin = None
        self.optimizer = self.groups = self.choice = self.cached = None
        self.steps_before = self.skipped_before = 0
        self.selection.forget()

    def state_dict(self) -> dict[str, Any]:
        """What the phase goes on from: coefficients, the solver's state, directions, groups."""
        assert self.optimizer is not None
        state = {
            "optimizer": self.optimizer.state_dict(),
            "mixing": self.optimizer.subspace.mixing,
            **(self.cached.state_dict() if self.cached is not None else {}),
        }
        if self.selection.chose:
            state["heldout"] = self.selection.state_dict()
        if self.groups is not None:
            state["groups"] = {
                **self.groups.state_dict(),
                "steps_before": self.steps_before,
                "skipped_before": self.skipped_before,
            }
        return state


def _point(phase: Optimization) -> dict[str, Any]:
    """What a phase can go back to."""
    assert phase.optimizer is not None
    point: dict[str, Any] = {"averaging_weights": phase.averaging_weights}
    if phase.groups is None:
        point["raw"] = in_float64(phase.optimizer.raw).to("cpu", copy=True)
    return point


def _placed(origin: Tensor | None, like: Tensor) -> Tensor | None:
    return None if origin is None else origin.to(like)


def _warn_of_missing_gradients(names: list[str], module: LightningModule) -> None:
    """After the first batch: hooks of the module may unfreeze until then."""
    named = dict(module.named_parameters())
    frozen = [name for name in names if not named[name].requires_grad]
    if frozen:
        warn(
            f"Parameters that were trained are frozen now ({len(frozen)}, the first is "
            f"{frozen[0]!r}): they are averaged, but the coefficients are trained without their "
            f"gradients. BackboneFinetuning leaves them frozen when a run is resumed after its "
            f"unfreezing; unfreeze them in your module's setup()."
        )
