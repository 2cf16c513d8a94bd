"""Whether it is the phase's optimizer that moves the weights."""

from __future__ import annotations

import torch
from torch import nn

from lightning_twa.machine import warn
from lightning_twa.phases.temporary import few_of
from lightning_twa.subspace import SubspaceOptimizer

__all__ = ["StepWatch"]


class StepWatch:
    """Somebody else may step where the phase should: methods of the user's optimizer other than
    ``step``, or an optimizer that has taken the place of the Trainer's.

    Args:
        optimizer: Of the phase.
    """

    def __init__(self, optimizer: SubspaceOptimizer) -> None:
        self._optimizer = optimizer
        self._seen = self._count()
        self._warned = False

    def _count(self) -> int:
        return self._optimizer.attempts

    def look(self, module: nn.Module) -> None:
        """After a batch that ends with an optimizer step: where it was not the phase's, the weights
        are put back, and there is a warning, once.
        """
        before, self._seen = self._seen, self._count()
        if self._seen != before:
            return
        names = [spec.name for spec in self._optimizer.subspace.layout.specs]
        now = few_of(module, names)
        self._optimizer.write_parameters()
        ours = few_of(module, names)
        if not self._warned and any(not torch.equal(now[n], few) for n, few in ours.items()):
            self._warned = True
            warn(
                "In the TWA phase something else than a step of the Trainer's optimizer has moved "
                "the weights (a method of its own in optimizer_step(), as SAM has, or another "
                "optimizer): it is undone, and the coefficients are not trained by such batches. "
                "Call optimizer.step(closure) in the phase (callback.phase == 'optimize')."
            )
