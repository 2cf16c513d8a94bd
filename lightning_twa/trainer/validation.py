"""Around the validations of a run, and what its checkpoints hold as the module's state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["AroundValidation", "state_of_module"]


def state_of_module(trainer: Trainer) -> dict[str, Any]:
    """The module's weights and buffers, under the names that its checkpoints have."""
    strategy = trainer.strategy
    state: dict[str, Any] = type(strategy).lightning_module_state_dict(strategy)
    return state


class AroundValidation:
    """Has something done before every hook of a validation and after all of them.

    Hooks would not do: another callback, or a hook of the module, that puts weights of its own into
    the model for the validation may come before ours both times, and would then put back what it
    found: the average. A copy surrounds nothing.
    """

    def __init__(self) -> None:
        self._look: Callable[[], dict[str, Tensor]] | None = None  # while a validation runs
        self._seen: dict[str, Tensor] = {}
        self._undo = ExitStack()

    def __reduce__(self) -> Any:
        return AroundValidation, ()

    def install(
        self,
        trainer: Trainer,
        begins: Callable[[], None],
        ended: Callable[[], None],
        validated: Callable[[], dict[str, Any] | None],
        look: Callable[[], dict[str, Tensor]],
    ) -> None:
        """From the next validation on.

        Args:
            trainer: The Trainer, after its sanity check.
            begins: Called before each validation.
            ended: Called after each; not after one that an exception ended.
            validated: The state that checkpoints are to have in place of the module's; ``None``
                for the module's own.
            look: Gives something of the weights in the model.
        """
        self.remove()
        loop, strategy = trainer.fit_loop.epoch_loop.val_loop, trainer.strategy
        run, own_state = loop.run, strategy.lightning_module_state_dict

        def run_between() -> Any:
            loop._module_mode.mode = {}  # of the validation before: training is still under way
            begins()
            self._seen, self._look = look(), look
            try:
                found = run()
            finally:
                self._look = None
            ended()
            return found

        def state() -> dict[str, Any]:
            other = validated()
            return own_state() if other is None else other

        self._undo.callback(delattr, loop, "run")
        self._undo.callback(delattr, strategy, "lightning_module_state_dict")
        loop.run = run_between  # type: ignore[method-assign]
        strategy.lightning_module_state_dict = state  # type: ignore[method-assign]

    @property
    def sees_others(self) -> bool:
        """Whether a validation is under way, and somebody has put other weights into the model."""
        if self._look is None:
            return False
        now = {name: few.nan_to_num() for name, few in self._look().items()}  # NaN equals nothing
        seen = {name: few.nan_to_num() for name, few in self._seen.items()}
        return any(n not in now or not torch.equal(now[n], few) for n, few in seen.items())

    def remove(self) -> None:
        """Undo it. May be called again."""
        self._look = None
        self._undo.close()
