"""The uniform average of the candidates in the model's place, for validation while collecting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_twa.candidates import (
    RunningMean,
    Store,
    copies_on_host,
    is_dense,
    put_average,
    put_back,
    unchanged_names,
    weights_and_buffers,
)
from lightning_twa.machine import warn
from lightning_twa.trainer import HeldModes

__all__ = ["TemporaryAverage", "copies_of", "few_of"]

FEW = 4  # entries of a tensor that are looked at


class TemporaryAverage:
    """Puts an average into a model and the weights back, and remembers the average.

    Attributes:
        validated: The state of the module, as checkpoints have it, with the average that was
            validated last, on the CPU; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.validated: dict[str, Any] | None = None
        self._raw: dict[str, Tensor] | None = None  # the weights, while the average is in place
        # of the average, until a validation has begun with it
        self._sample: dict[str, Tensor] | None = None
        self._warned = False
        self._modes = HeldModes()
        self._mean = RunningMean()

    @property
    def in_place(self) -> bool:
        """Whether the average is in the model."""
        return self._raw is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_raw": None}  # a copy is in no model

    def put_in(
        self,
        module: nn.Module,
        store: Store,
        reestimate: Callable[[], object],
        trainer: Trainer | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        """Put the uniform average of the candidates in place; nothing without candidates.

        Args:
            module: The model.
            store: The candidates.
            reestimate: Computes BatchNorm statistics for the weights in place.
            trainer: An optimizer of it that has other weights for evaluation gets at them when its
                own are back.
            only: Names of what is averaged; ``None`` for all.
        """
        if len(store) == 0:
            return
        stay = unchanged_names(store, module)
        held = weights_and_buffers(module)
        self._raw = copies_on_host({n: t for n, t in held.items() if n not in stay})
        self._modes = HeldModes(trainer, postpone=True)
        averaged = {n for n in self._raw if only is None or n in only}
        put_average(module, store, averaged, self._mean.parameters(store, averaged))
        reestimate()
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        self._sample = few_of(module, trained)

    def check(self, module: nn.Module) -> None:
        """Warn, once, where somebody has put other weights in the average's place."""
        if self._sample is None or self._warned:
            return
        now = few_of(module, self._sample)  # a module may freeze itself for a validation
        self._warned = any(
            n in now and not torch.equal(few, now[n]) for n, few in self._sample.items()
        )
        self._sample = None
        if self._warned:
            warn(
                "TWACallback(validate_average=True) has put the average into the model, but a hook "
                "of the module or of another callback has put other weights there for the "
                "validation (an EMA?): those are validated. The weights come back all the same. "
                "Leave one of the two out."
            )

    def take_out(
        self, module: nn.Module, state: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """Put the weights back; does nothing where they are in place.

        Args:
            module: The model.
            state: Of the module as checkpoints have it, to be remembered; ``None`` where the
                validation did not end.
        """
        if self._raw is None:
            return
        if state is not None:
            self.validated = copies_of(state())
        put_back(module, self._raw)
        self._raw = self._sample = None
        self._modes.release()

    def free(self) -> None:
        """Keep nothing that only another average to come would need."""
        self._mean.clear()

    @contextmanager
    def weights_in_place(self, module: nn.Module) -> Iterator[None]:
        """Have the weights in the model for a moment; what is there comes back."""
        if self._raw is None:
            yield
            return
        held = weights_and_buffers(module)
        now = copies_on_host({n: held[n] for n in self._raw if n in held})
        put_back(module, self._raw)
        try:
            yield
        finally:
            put_back(module, now)

    def weights_for(
        self, module: nn.Module, state: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The weights to go on from, for a checkpoint whose state is what was or is validated;
        ``None`` where nothing was.

        Args:
            module: The model.
            state: Of the module as checkpoints have it.
        """
        if self.in_place:
            with self.weights_in_place(module):
                return copies_of(state())
        return None if self.validated is None else state()


def copies_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what a state dict shares with its module, on the CPU; tied tensors stay tied."""
    copies: dict[Any, Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter):  # extra state, or a part of a sharded tensor
            result[name] = copy.deepcopy(value)
            continue
        if not is_dense(value):
            result[name] = value.detach().to("cpu", copy=True)
            continue
        place = (value.data_ptr(), value.shape, value.dtype, value.stride())
        if place not in copies or not value.numel():
            copies[place] = value.detach().to("cpu", copy=True)
        result[name] = copies[place]
    return result


def few_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The first entries of parameters, copied."""
    held = weights_and_buffers(module)
    return {n: held[n].detach().reshape(-1)[:FEW].float().cpu().clone() for n in names if n in held}
