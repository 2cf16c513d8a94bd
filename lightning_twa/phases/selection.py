"""Choosing where the phase starts and what of its path is kept, by held-out losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import (
    Store,
    fit_singular_vectors_,
    put_weighted,
    weights_and_buffers,
)
from lightning_twa.config import Settings
from lightning_twa.machine import say, warn
from lightning_twa.phases.choose import Comparison, fixed_averages, points_of_path
from lightning_twa.phases.held_out import HeldOut
from lightning_twa.phases.training_loss import TrainingLoss
from lightning_twa.results import Result
from lightning_twa.subspace import TensorSpec
from lightning_twa.trainer import BatchWatch

__all__ = ["Selection"]


class Selection:
    """What held-out data say of a phase. Every process calls every method.

    Args:
        settings: The arguments of the callback.
        batches: Whether hooks change batches.

    Attributes:
        held_out: The data.
        training_loss: What is known where there are none.
        comparison: What was measured.
        origin: ``(n, B)`` the averaging weights of the best fixed average, from which the phase
            starts; ``None`` where it starts from the uniform average of all candidates.
        averages: ``(n,)`` the averaging weights of each fixed average.
        news: What was measured last, for loggers, by name.
        stays: Whether the phase ends where its last step was, whatever was chosen.
    """

    def __init__(self, settings: Settings, batches: BatchWatch) -> None:
        self.settings = settings
        self.held_out = HeldOut(settings)
        self.training_loss = TrainingLoss(settings, batches)
        self.comparison = Comparison()
        self.origin: Tensor | None = None
        self.averages: dict[str, Tensor] = {}
        self.news: dict[str, float] = {}
        self.stays = False
        self._batches = batches
        self._points: list[int] = []
        self._on = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_on": False}  # a copy has no batches

    @property
    def chose(self) -> bool:
        """Whether there was something to choose by."""
        return bool(self.comparison.fixed)

    def try_batch(self, trainer: Trainer, module: LightningModule, held_back: Any) -> None:
        """See :meth:`~lightning_twa.phases.held_out.HeldOut.try_batch`."""
        changed = self._batches.changed
        with self._batches.in_replay():
            self.held_out.try_batch(trainer, module, held_back, with_hooks=changed)

    def begin(
        self,
        trainer: Trainer,
        module: LightningModule,
        store: Store,
        specs: Iterable[TensorSpec],
        num_blocks: int,
        steps: int | None,
        held_back: Any,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        """At the switch: compare the fixed averages, each in the model's place; what is in it then
        is to be replaced.

        Args:
            trainer: The Trainer.
            module: The module.
            store: The candidates.
            specs: The parameters that are averaged.
            num_blocks: ``B``.
            steps: Of the phase; ``None`` where that is not known.
            held_back: See :func:`~lightning_twa.phases.phase_data.request_loader`.
            kept: From :meth:`state_dict`, to go on from.
        """
        specs = list(specs)
        self.comparison, self.origin, self.news = Comparison(), None, {}
        self.stays = False
        self.averages = averages = self._averages(store.names, store.given_names)
        self._points = points_of_path(steps)[:-1]  # the end is compared in any case
        self.training_loss.begin(steps, resumed=kept is not None)
        if kept is not None and not kept["fixed"]:
            self.held_out.reason = "nothing was compared where the phase began"
            self.held_out.data = None
            return
        self._on = self.held_out.draw(trainer, held_back, steps, len(averages))
        if kept is not None:
            self.comparison.load_state_dict(kept)
            self._check_batches()
        elif self._on:
            try:
                with self.held_out.progress(trainer, len(averages)) as tick:
                    for name, weights in averages.items():
                        put_weighted(module, store, specs, weights[:, None].expand(-1, num_blocks))
                        *_, newest = store
                        fit_singular_vectors_(weights_and_buffers(module), newest.tensors)
                        self.comparison.fixed[name] = self._measure(trainer, module, tick)
            except Exception as error:  # of the user's step
                self._give_up(error)
            self._check_finite()
        if self.chose:
            found = averages[self.comparison.start]
            if self.settings.subspace.parametrization == "free":
                self.origin = found[:, None].expand(-1, num_blocks).clone()
            self.news = {n: float(x.mean()) for n, x in self.comparison.fixed.items()}
        elif self.settings.heldout is not None:
            say(
                f"TWA: nothing is chosen by held-out data ({self.held_out.reason}): the phase "
                f"starts from the uniform average of the candidates, and its end is the result, "
                f"whether it is better or not."
            )

    def _averages(self, names: Sequence[str], given: Sequence[str]) -> dict[str, Tensor]:
        soup, dense = len(given) == len(names), self.settings.collect.dense
        return fixed_averages(names, given, soup=soup, dense=dense)

    def _check_batches(self) -> None:
        """Losses of other batches than those of before cannot be compared with theirs."""
        compared = len(next(iter(self.comparison.fixed.values())))
        if self._on and self.held_out.batches != compared:
            self._on = False
            warn(
                f"The phase that goes on was compared on {compared} held-out batches, but there "
                f"are {self.held_out.batches} now (other data, batch size, or length of the run): "
                f"nothing more is compared, and the best of what was is the result."
            )
            self.held_out.there = None
        self.held_out.batches = compared

    def _measure(
        self, trainer: Trainer, module: LightningModule, tick: Callable[[int], object]
    ) -> Tensor:
        changed = self._batches.changed
        with self._batches.in_replay():
            return self.held_out.measure(trainer, module, with_hooks=changed, tick=tick)

    def _check_finite(self) -> None:
        fixed = self.comparison.fixed
        if fixed and not math.isfinite(float(fixed[self.comparison.start].mean())):
            self.comparison, self._on = Comparison(), False
            self.held_out.reason = "no average has a finite loss on them"

    def _give_up(self, error: Exception) -> None:
        self.comparison, self._on = Comparison(), False
        self.held_out.reason = f"measuring failed ({type(error).__name__}: {error})"

    def look(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: int,
        point: Callable[[], dict[str, Any]],
        *,
        at_end: bool = False,
    ) -> None:
        """In the phase: compare the weights in the model, where that is due.

        Args:
            trainer: The Trainer.
            module: The module.
            step: Optimizer steps of the phase.
            point: What the phase goes back to.
            at_end: Whether this is the end.
        """
        if not self.chose:
            self.training_loss.look(trainer, module, at_end=at_end)
        due = at_end or step in self._points
        if not (self._on and due) or step in self.comparison.path:
            return
        try:
            with self.held_out.progress(trainer) as tick:
                losses = self._measure(trainer, module, tick)
        except Exception as error:  # of the user's step
            self._on = False
            warn(
                f"The loss on held-out data could not be measured in the phase "
                f"({type(error).__name__}: {error}). The best of what was measured is the result."
            )
            return
        self.comparison.path[step] = losses
        self.news = {"path": float(losses.mean())}
        if self.comparison.accepted == step:
            self.comparison.best = {"step": step, **point()}

    def verdict(self, step: int) -> dict[str, Any] | None:
        """What the run ends with instead of the weights after the phase's last step: a point as
        :meth:`look` was given it, or the start (empty); ``None`` for the last step.

        Args:
            step: Of the phase, its last.
        """
        if not self.chose or self.stays or self.comparison.accepted == step:
            return None
        return {} if self.comparison.accepted is None else dict(self.comparison.best)

    def weights_of_start(self, num_blocks: int) -> Tensor:
        """``(n, B)`` the averaging weights of the best fixed average."""
        return self.averages[self.comparison.start][:, None].expand(-1, num_blocks).clone()

    def result(self, steps: int, seconds: float) -> Result:
        """What the phase was worth.

        Args:
            steps: Of the phase.
            seconds: That it took.
        """
        comparison, held_out = self.comparison, self.held_out
        if not self.chose:
            return Result(
                heldout=None,
                reason=held_out.reason,
                steps=steps,
                phase_seconds=seconds,
                measuring_seconds=held_out.seconds,
            )
        accepted = steps if self.verdict(steps) is None else comparison.accepted
        gain, error = 0.0, math.nan
        if accepted in comparison.path:
            gain, error = comparison.gain_of(accepted)
        return Result(
            heldout=held_out.data or "held-out data",
            losses={name: float(x.mean()) for name, x in comparison.fixed.items()},
            averages={n: self.averages[n].tolist() for n in comparison.fixed},
            path={step: float(x.mean()) for step, x in comparison.path.items()},
            start=comparison.start,
            accepted=accepted,
            gain=gain,
            gain_error=error,
            batches=held_out.batches,
            of_batches=held_out.there,
            steps=steps,
            phase_seconds=seconds,
            measuring_seconds=held_out.seconds,
        )

    def forget(self) -> None:
        """Free the batches."""
        self._on = False
        self.held_out.clear()
        self.training_loss.forget()

    def state_dict(self) -> dict[str, Any]:
        """What a phase goes on with."""
        return self.comparison.state_dict()
