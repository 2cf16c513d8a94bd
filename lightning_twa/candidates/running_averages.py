"""Running averages of the weights, which become candidates beside the snapshots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.subspace import local_part, to_shards

__all__ = ["RunningAverages", "average_name"]


def average_name(decay: float) -> str:
    """Name of the candidate, ``"ema(0.97)"``."""
    return f"ema({decay:g})"


class RunningAverages:
    """Exponential moving averages of a module's trainable weights, one for each decay; of sharded
    ones this process's part.

    After ``t`` updates an average is ``sum_s d^(t-s) w_s / sum_s d^(t-s)``: with Adam's bias
    correction the weights from before the first update have no part in it, and a decay close to 1
    gives the plain mean of what has been seen.

    Args:
        decays: One in (0, 1) for each average; 1 is the plain mean.
        device: Where they are kept; ``None`` means with the parameters.
    """

    def __init__(self, decays: Iterable[float], device: torch.device | str | None = None) -> None:
        self.decays = tuple(decays)
        self.device = None if device is None else torch.device(device)
        self.updates = 0
        self._averages: dict[str, list[Tensor]] = {}  # by parameter, one tensor for each decay

    def __getstate__(self) -> dict[str, Any]:
        averages = {n: [t.to("cpu") for t in tensors] for n, tensors in self._averages.items()}
        return {**vars(self), "_averages": averages}  # a copy may have no such device

    @property
    def names(self) -> list[str]:
        """Names of the candidates that they give; empty before the first update."""
        return [average_name(decay) for decay in self.decays] if self.updates else []

    @torch.no_grad()
    def update(self, module: nn.Module, only: Collection[str] | None = None) -> None:
        """Take in the module's trainable weights, after each optimizer step.

        Args:
            module: The model.
            only: Names of those that are taken in; ``None`` for all.

        Raises:
            ValueError: Naming a parameter that has changed its shape.
        """
        if not self.decays:
            return
        self.updates += 1
        to_shards(module)
        averages: list[list[Tensor]] = []
        current: list[Tensor] = []
        for name, whole in module.named_parameters():
            # one that was trained stays in, also where it is frozen again
            if not whole.is_floating_point():
                continue
            if not (whole.requires_grad or name in self._averages):
                continue
            if only is not None and name not in only:
                continue
            parameter = local_part(whole)
            if name not in self._averages:  # at the first update, or trainable only now
                self._averages[name] = [self._copy(parameter) for _ in self.decays]
            elif self._averages[name][0].device != (self.device or parameter.device):  # resumed
                target = self.device or parameter.device
                self._averages[name] = [t.to(target) for t in self._averages[name]]
            averages.append(self._averages[name])
            if averages[-1][0].shape != parameter.shape:
                raise ValueError(
                    f"Parameter {name!r} has changed its shape in the run: "
                    f"{tuple(averages[-1][0].shape)} in the running average, "
                    f"{tuple(parameter.shape)} now. Weights of different shapes cannot be "
                    f"averaged. Collect from where the model has its last form "
                    f"(CollectConfig(start=...))."
                )
            current.append(parameter.to(device=self.device, dtype=averages[-1][0].dtype))
        for i, decay in enumerate(self.decays):
            mean = decay == 1
            share = 1 / self.updates if mean else (1 - decay) / (1 - decay**self.updates)
            torch._foreach_lerp_([tensors[i] for tensors in averages], current, share)

    def _copy(self, parameter: Tensor) -> Tensor:
        # In bfloat16 a small step would be rounded away.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(
            self.device, dtype, copy=True, memory_format=torch.contiguous_format
        )

    def move_to(self, device: torch.device | str) -> None:
        """Keep the averages elsewhere until the next update, which takes them back."""
        for name, averages in self._averages.items():
            self._averages[name] = [average.to(device) for average in averages]

    def weights(self, i: int) -> dict[str, Tensor]:
        """The average with ``decays[i]``, by name of the parameter."""
        return {name: averages[i] for name, averages in self._averages.items()}

    def clear(self) -> None:
        """Begin anew with the next update."""
        self.updates = 0
        self._averages = {}

    def state_dict(self) -> dict[str, Any]:
        """Copies on the CPU."""
        return {
            "decays": list(self.decays),
            "updates": self.updates,
            "averages": [
                {name: t.to("cpu", copy=True) for name, t in self.weights(i).items()}
                for i in range(len(self.decays))
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: When it has other decays.
        """
        if tuple(state["decays"]) != self.decays:
            raise ValueError(
                f"The checkpoint's run has CollectConfig.ema_decays={tuple(state['decays'])}, but "
                f"this callback has {self.decays}. Resume with the same."
            )
        self.updates = state["updates"]
        names = list(state["averages"][0]) if state["averages"] else []
        self._averages = {
            name: [average[name].clone() for average in state["averages"]] for name in names
        }
