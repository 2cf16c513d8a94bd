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
        self._drawn: list[Any] = []
        self._batches = 0
        self._reason = ""
        self._before: float | None = None
        self._after: float | None = None
        self._resumed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_drawn": []}  # a copy has no batches

    def begin(
        self, trainer: Trainer, module: LightningModule, steps: int | None, *, resumed: bool
    ) -> None:
        """Measure the weights that the phase starts with, or goes on with.

        Args:
            trainer: With the phase's data.
            module: With the phase's weights.
            steps: Of the phase; ``None`` where that is not known.
            resumed: Whether it goes on.
        """
        self.forget()
        self._after, self._resumed = None, resumed
        self._reason = "their samples cannot be chosen"
        loader = samples_of_training(trainer)
        if loader is None:
            return
        trained = FEW / SHARE if steps is None else steps * trainer.accumulate_grad_batches
        at_most = max(1, min(FEW, int(SHARE * trained)))
        try:
            with in_common():
                self._drawn = draw_batches(loader, at_most, rank(), world_size())
        except Exception as error:  # of whatever reads the data
            self._reason = f"they could not be read ({error})"
            return
        self._before = self._measure(trainer, module)

    def end(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the weights that the phase ends with."""
        if self._before is not None:
            self._after = self._measure(trainer, module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> float | None:
        changed = self._watch.changed
        try:
            with self._watch.in_replay():
                losses = common_losses(trainer, module, self._drawn, with_hooks=changed)
        except Exception as error:  # of the user's step
            self._reason = f"measuring failed ({type(error).__name__}: {error})"
            return None
        self._batches = len(losses)
        if len(losses) == 0 or not bool(losses.isfinite().all()):
            self._reason = "training_step has no finite loss for them in evaluation mode"
            return None
        return float(losses.mean())

    def __str__(self) -> str:
        """A sentence."""
        if self.settings.heldout is None:
            return "No loss was compared (heldout=None)."
        data = DATA[self.settings.data]
        if self._before is None or self._after is None:
            return f"Whether the loss on {data} fell is not known: {self._reason}."
        where = "when it was resumed" if self._resumed else "before the phase"
        batches = count(self._batches, "batch")
        return (
            f"Mean loss of training_step on {batches} of {data}, in evaluation mode: "
            f"{self._before:.4g} {where}, {self._after:.4g} after it."
        )

    def forget(self) -> None:
        """Free the batches."""
        self._drawn, self._before = [], None
