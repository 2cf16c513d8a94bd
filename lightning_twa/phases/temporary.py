"""The uniform average of the candidates in the model's place, for validation while collecting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_twa.candidates import Store, copy_into, put_average, weights_and_buffers
from lightning_twa.checkpoint import RAW_WEIGHTS

__all__ = ["TemporaryAverage", "restore_raw_weights"]


class TemporaryAverage:
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
        state = weights_and_buffers(module)
        self._raw = {name: tensor.detach().clone() for name, tensor in state.items()}
        put_average(module, store)
        reestimate()

    def take_out(self, module: nn.Module) -> None:
        """Put the weights back; does nothing where they are in place."""
        if self._raw is None:
            return
        state = weights_and_buffers(module)
        self._average = {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
        copy_into(state, self._raw)
        self._raw = None

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Give a checkpoint the average that was validated last, and the weights to go on from
        under a key of their own; nothing where none was validated. What the average does not have
        (extra state) is as in the weights.
        """
        if not self._average:
            return
        raw: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint[RAW_WEIGHTS] = raw
        checkpoint["state_dict"] = {n: self._average.get(n, value) for n, value in raw.items()}


def restore_raw_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the weights to go on from where a checkpoint's ``state_dict`` is an average.

    Lightning's ``WeightAveraging`` uses the same key, beside ``averaging_state``; a run that goes
    on with this callback instead starts from its average.
    """
    if RAW_WEIGHTS in checkpoint and "averaging_state" not in checkpoint:
        module.load_state_dict(checkpoint[RAW_WEIGHTS], strict=module.strict_loading)
