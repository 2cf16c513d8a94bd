"""The uniform average of the candidates in the model's place, for validation while collecting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_twa.candidates import Store, persistent_buffers
from lightning_twa.state import RAW_WEIGHTS
from lightning_twa.subspace import TensorSpec, local_part, to_shards

__all__ = ["AverageSwap", "copy_into", "put_average", "put_weighted", "restore_raw_weights"]


class AverageSwap:
    """Puts an average into a model and the weights back, and remembers the average."""

    def __init__(self) -> None:
        self._raw: dict[str, Tensor] | None = None  # the weights, while the average is in place
        self._average: dict[str, Tensor] = {}  # the last average that was validated, on the CPU

    def put_in(self, module: nn.Module, store: Store, reestimate: Callable[[], object]) -> None:
        """Put the uniform average of the candidates in place; nothing without candidates.

        Args:
            module: The model.
            store: The candidates.
            reestimate: Computes BatchNorm statistics for the weights in place.
        """
        if len(store) == 0:
            return
        state = _state(module)
        self._raw = {name: tensor.detach().clone() for name, tensor in state.items()}
        put_average(module, store)
        reestimate()

    def take_out(self, module: nn.Module) -> None:
        """Put the weights back; does nothing where they are in place."""
        if self._raw is None:
            return
        state = _state(module)
        self._average = {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
        copy_into(state, self._raw)
        self._raw = None

    def averaged(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A state dict with the average that was validated last in place of the weights; ``None``
        where none was. What the average does not have (extra state) is as in the weights.
        """
        if not self._average:
            return None
        return {name: self._average.get(name, value) for name, value in state_dict.items()}


def restore_raw_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the weights to go on from where a checkpoint's ``state_dict`` is an average.

    Lightning's ``WeightAveraging`` uses the same key, beside ``averaging_state``; a run that goes
    on with this callback instead starts from its average.
    """
    if RAW_WEIGHTS in checkpoint and "averaging_state" not in checkpoint:
        module.load_state_dict(checkpoint[RAW_WEIGHTS], strict=module.strict_loading)


def put_average(module: nn.Module, store: Store) -> None:
    """Write the uniform average of the candidates into a module, one tensor after another."""
    state = _state(module)
    for name, value in store.mean_parameters():
        copy_into(state, {name: value})
    copy_into(state, store.mean_buffers())


def put_weighted(
    module: nn.Module, store: Store, specs: Iterable[TensorSpec], weights: Tensor
) -> None:
    """Write a weighted average of the candidates into a module's parameters, summed in float64.

    Args:
        module: The model.
        store: The candidates.
        specs: The parameters to write, and the blocks they belong to.
        weights: ``(n, B)``.
    """
    named = dict(module.named_parameters())
    for spec in specs:
        total: Tensor | None = None
        for weight, candidate in zip(weights[:, spec.block].tolist(), store, strict=True):
            if weight != 0:
                term = weight * candidate.parameters[spec.name].double()
                total = term if total is None else total.add_(term)
        assert total is not None, "averaging weights sum to 1"
        copy_into({spec.name: local_part(named[spec.name])}, {spec.name: total})


def _state(module: nn.Module) -> dict[str, Tensor]:
    to_shards(module)
    named = {**dict(module.named_parameters()), **persistent_buffers(module)}
    return {name: local_part(tensor) for name, tensor in named.items()}


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy each value into the target of its name."""
    for name, value in values.items():
        targets[name].copy_(value)
