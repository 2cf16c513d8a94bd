"""The averages over all steps of a run that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_twa.candidates import MEAN, PowerAverages

__all__ = ["power_averages_of"]


def power_averages_of(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Power averages and the mean of all steps, until the moment of the checkpoint or, in the
    phase, until it began.

    Args:
        state: From :func:`~lightning_twa.checkpoint.read_state`.

    Returns:
        By name, weights by name of the parameter, on the CPU; not of what was not trained.

    Raises:
        ValueError: When it holds none, and what to do.
    """
    if state["phase"] == "done":
        raise ValueError(
            "it is of a finished run, which holds no running averages any more. Give a checkpoint "
            "of before or within the phase, or use average(twa, 'power', sigma_rel=...) in the "
            "program that trains"
        )
    held = state["candidates"]
    if "power" in held:
        entries = held["power"]["averages"]
    else:
        entries = [e for e in held.get("given", []) if _is_power(e["name"])]
    if not entries:
        raise ValueError(
            "it holds no running averages over all steps. Its run needs "
            "CollectConfig.power_averages, which are on by default"
        )
    if any("files" in entry for entry in entries):
        raise ValueError(
            "its running averages are in files of their own, which are not read here. Use "
            "average(twa, 'power', sigma_rel=...) in the program that trains"
        )
    if "power" not in held:
        return {entry["name"]: dict(entry["parameters"]) for entry in entries}
    averages = PowerAverages(held["power"]["widths"])
    averages.load_state_dict(held["power"])
    return averages.weights()


def _is_power(name: str) -> bool:
    return name == MEAN or name.startswith("power(")
