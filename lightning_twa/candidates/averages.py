"""All averages over optimizer steps of a run, until they become candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_twa.candidates.parked import Parked
from lightning_twa.candidates.power_averages import PowerAverages, interval_of
from lightning_twa.candidates.retake import keep_last
from lightning_twa.candidates.running_averages import RunningAverages, average_name
from lightning_twa.candidates.selected import averaged_names
from lightning_twa.candidates.store import Store
from lightning_twa.config import CollectConfig

__all__ = ["Averages"]


class Averages:
    """Exponential moving averages over the window, power averages over all steps, and the mean
    since the newest candidate. Every process calls every method.

    Args:
        collect: Decays and widths.
        widths: Of the power averages that are kept.
    """

    def __init__(self, collect: CollectConfig, widths: tuple[float, ...]) -> None:
        self._collect = collect
        self._averaged: set[str] | None = None  # names, where not all are
        self._parameters = -1  # so many there were when these were found
        self._ema = RunningAverages(collect.ema_decays, collect.ema_device)
        self._power = PowerAverages(widths)
        self._dense = RunningAverages((1.0,) if collect.dense else (), collect.ema_device)
        self._parked = {key: Parked() for key in ("averages", "power", "dense")}

    @property
    def names(self) -> list[str]:
        """Names of the candidates that they give."""
        return [*self._ema.names, *self._power.names]

    @property
    def has_steps(self) -> bool:
        """Whether there is anything in them."""
        return any(kind.updates > 0 for kind in (self._ema, self._power, self._dense))

    def set_length(self, steps: int | None) -> None:
        """Say how many optimizer steps the part of the run has, where that is known."""
        self._power.interval = interval_of(steps)

    def follow(self, module: nn.Module, *, in_window: bool) -> None:
        """After an optimizer step.

        Args:
            module: The model.
            in_window: Whether the step is in the window of candidates.
        """
        if self._collect.selects:
            now = sum(1 for _ in module.parameters())
            if now != self._parameters:  # the names need not be looked at in every step
                self._averaged, self._parameters = averaged_names(module, self._collect), now
        self._power.update(module, self._averaged)
        if in_window:
            self._ema.update(module, self._averaged)
            self._dense.update(module, self._averaged)

    def since_newest(self) -> dict[str, Tensor]:
        """With ``dense``: the mean over the steps of the window that no candidate has yet, by name
        of the parameter; empty where there are none. The next one begins anew.
        """
        mean = self._dense.weights(0) if self._dense.updates else {}
        self._dense.clear()
        return mean

    def give(self, store: Store, module: nn.Module, step: int) -> None:
        """At the switch: they become candidates, and with power averages the last weights do.

        Args:
            store: Of the candidates.
            module: The model.
            step: Optimizer steps of the run.
        """
        has_power = bool(self._power.names)
        for i, decay in enumerate(self._ema.decays if self._ema.updates else ()):
            store.give(module, average_name(decay), self._ema.weights(i))
        for name, weights in self._power.weights().items():
            store.give(module, name, weights)
        if has_power:
            name = f"step={step}"
            keep_last(store, module, f"last({name})" if self._collect.dense else name)
        store.settle()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.clear_window()
        self._power.clear()

    def clear_window(self) -> None:
        """The window begins now."""
        self._ema.clear()
        self._dense.clear()

    def free_device(self) -> None:
        """Keep nothing on the device that the run does not need before it goes on."""
        self._ema.move_to("cpu")
        self._dense.move_to("cpu")
        self._power.release_device()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of them, where parameters are not sharded."""
        state: dict[str, Any] = {}
        if self._ema.updates:
            state["averages"] = self._ema.state_dict()
        if self._power.updates:
            state["power"] = self._power.state_dict()
        if self._dense.updates:
            state["dense"] = self._dense.state_dict()
        return state

    def park(self, store: Store) -> dict[str, Any]:
        """The same of sharded parameters, in files.

        Args:
            store: Whose files they are beside, and whose state is in the checkpoint.
        """
        state: dict[str, Any] = {}
        power = self._power
        for key, ema in (("averages", self._ema), ("dense", self._dense)):
            if not ema.updates:
                continue
            parts = {name: ema.weights(i) for i, name in enumerate(ema.names)}
            files = self._parked[key].dump(store, ema.updates, parts)
            if files is not None:
                numbers = {"decays": list(ema.decays), "updates": ema.updates}
                state[key] = {**numbers, "averages": files}
        if power.updates:
            files = self._parked["power"].dump(store, power.updates, power.parts())
            if files is not None:
                state["power"] = {**power.numbers(), "averages": files}
        return state

    def load(self, store: Store, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds.

        Raises:
            CandidateFileError: Naming a file that is missing or damaged.
            ValueError: When it has other decays or widths.
        """
        kinds: dict[str, RunningAverages | PowerAverages] = {
            "averages": self._ema,
            "power": self._power,
            "dense": self._dense,
        }
        for key, averages in kinds.items():
            held = state.get(key)
            if held is None:
                continue
            if key == "power" and not self._power.widths and self._collect.power_averages:
                continue  # nobody has asked for others: a uniform average needs none
            if key == "dense" and not self._dense.decays:
                raise ValueError(
                    "The checkpoint's run has CollectConfig(dense=True), but this callback has "
                    "dense=False. Resume with the same."
                )
            tensors = held["averages"]
            if any("files" in part for part in tensors):
                tensors = self._parked[key].load(store, held["updates"], tensors)
            averages.load_state_dict({**held, "averages": tensors})
