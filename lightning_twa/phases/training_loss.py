"""Whether the phase has lowered the loss on what it trains on, where no held-out data say more."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.config import DATA, Settings
from lightning_twa.machine import in_common, rank, world_size
from lightning_twa.phases.held_out import common_losses
from lightning_twa.trainer import BatchWatch, draw_batches, samples_of_training
from lightning_twa.words import count

__all__ = ["TrainingLoss"]

FEW = 8  # batches
SHARE = 1 / 8  # of the phase's batches, before and after it: a twelfth of its time at most


class TrainingLoss:
    """Mean loss of ``training_step`` on the same few batches before and after a phase. Every
    process calls every method.

    Args:
        settings: The arguments of the callback.
        watch: Whether hooks change batches.
    """

    def __init__(self, settings: Settings, watch: BatchWatch) -> None:
        self.settings = settings
        self._watch = watch
        self._drawn: list[Any] | None = None  # None: not yet
        self._steps: int | None = None
        self._batches = 0
        self._reason = ""
        self._losses: list[float] = []  # before, and after
        self._resumed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_drawn": None}  # a copy has no batches

    def begin(self, steps: int | None, *, resumed: bool) -> None:
        """A phase begins.

        Args:
            steps: Of the phase; ``None`` where that is not known.
            resumed: Whether it goes on.
        """
        self.forget()
        self._steps, self._resumed = steps, resumed
        self._losses, self._reason = [], ""

    def look(self, trainer: Trainer, module: LightningModule, *, at_end: bool) -> None:
        """Measure the weights in the model where the phase begins, and where it ends.

        Args:
            trainer: With the phase's data.
            module: With the phase's weights.
            at_end: Whether this is the end.
        """
        first = self._drawn is None
        if self.settings.heldout is None or not (first or at_end) or self._reason:
            return
        if first:
            self._draw(trainer)
        if self._drawn:
            self._measure(trainer, module)

    def _draw(self, trainer: Trainer) -> None:
        self._drawn = []
        loader = samples_of_training(trainer)
        if loader is None:
            self._reason = "their samples cannot be chosen"
            return
        steps = FEW / SHARE if self._steps is None else self._steps
        at_most = max(1, min(FEW, int(SHARE * steps * trainer.accumulate_grad_batches)))
        try:
            with in_common():
                self._drawn = draw_batches(loader, at_most, rank(), world_size())
        except Exception as error:  # of whatever reads the data
            self._reason = f"they could not be read ({error})"

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        changed = self._watch.changed
        assert self._drawn is not None
        try:
            with self._watch.in_replay():
                losses = common_losses(trainer, module, self._drawn, with_hooks=changed)
        except Exception as error:  # of the user's step
            self._reason = f"measuring failed ({type(error).__name__}: {error})"
            return
        self._batches = len(losses)
        if not bool(losses.isfinite().all()):
            self._reason = "training_step has no finite loss for them in evaluation mode"
        self._losses.append(float(losses.mean()))

    def __str__(self) -> str:
        """A sentence."""
        if self.settings.heldout is None:
            return "No loss was compared (heldout=None)."
        data = DATA[self.settings.data]
        if self._reason or len(self._losses) != 2:
            reason = self._reason or "it was not measured"
            return f"Whether the loss on {data} fell is not known: {reason}."
        where = "when it was resumed" if self._resumed else "before the phase"
        before, after = self._losses
        return (
            f"Mean loss of training_step on {count(self._batches, 'batch')} of {data}, in "
            f"evaluation mode: {before:.4g} {where}, {after:.4g} after it."
        )

    def forget(self) -> None:
        """Free the batches."""
        self._drawn = None
