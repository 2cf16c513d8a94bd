"""An average over all steps of a run, of any width, from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lightning_twa.candidates import fitted_factors, load_checkpoint, without_wrappers
from lightning_twa.checkpoint import power_averages_of, read_state

__all__ = ["power_members"]


def power_members(path: Path, width: float) -> tuple[list[dict[str, Tensor]], list[float]]:
    """State dicts whose weighted sum is the average, and their weights.

    Args:
        path: A checkpoint that holds running averages.
        width: ``sigma_rel``, in ``(0, 1 / sqrt(12)]``.

    Raises:
        ValueError: Naming the file, and what to do.
    """
    try:
        held = power_averages_of(read_state(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}.") from error
    state = load_checkpoint(path, objects=True).get("state_dict", {})
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    members = []
    for weights in held.values():
        plain = {without_wrappers(name): value for name, value in weights.items()}
        own = {name: plain.pop(without_wrappers(name), value) for name, value in tensors.items()}
        wrong = [name for name, value in own.items() if value.shape != tensors[name].shape]
        if plain or wrong:
            raise ValueError(
                f"{path}: its running average has a tensor {[*plain, *wrong][0]!r} that does not "
                f"fit its state_dict. Use another checkpoint."
            )
        members.append({n: v.to(tensors[n].dtype) for n, v in own.items()})
    return members, fitted_factors(list(held), width)
