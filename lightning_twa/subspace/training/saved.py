"""What an optimizer of coefficients goes on from, on the CPU and in float64 wherever it works."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning_twa.subspace.tensors import in_float64
from lightning_twa.subspace.training.checks import check_size
from lightning_twa.subspace.training.schedules import resumed_peak
from lightning_twa.subspace.training.solvers import saved_solver

__all__ = ["load", "state_of"]


def state_of(optimizer: Any) -> dict[str, Any]:
    """See :meth:`SubspaceOptimizer.state_dict`."""
    steps = optimizer.steps
    moved_on = {} if optimizer._position == steps else {"position": optimizer._position}
    return {
        "coefficients": in_float64(optimizer.raw).to("cpu", copy=True),
        "path_length": in_float64(optimizer.path_length).to("cpu", copy=True),
        "steps": steps,
        "skipped_steps": optimizer.attempts - steps,
        **moved_on,
        "total_steps": optimizer.total_steps,
        "peak_lr": optimizer.peak_lr,
        "lr": float(optimizer.param_groups[0]["lr"]),
        "solver": saved_solver(optimizer._solver),
    }


def load(optimizer: Any, state: Mapping[str, Any]) -> None:
    """See :meth:`SubspaceOptimizer.load_state_dict`; the parameters are not written.

    Raises:
        ValueError: When the state belongs to a subspace of another size.
    """
    check_size(state["coefficients"], optimizer.raw)
    optimizer.raw.copy_(state["coefficients"])
    optimizer.path_length.copy_(state["path_length"])
    optimizer._taken.fill_(state["steps"])
    optimizer._told = state["skipped_steps"]
    optimizer.attempts = state["steps"] + state["skipped_steps"]
    # In earlier versions a skipped step did not use its place in the schedule up.
    optimizer._position = state.get("position", state["steps"])
    optimizer._solver.load_state_dict(copy.deepcopy(state["solver"]))
    if optimizer.total_steps is None:
        optimizer.param_groups[0]["lr"] = state["lr"]
        return
    optimizer.peak_lr = resumed_peak(
        optimizer.config,
        optimizer.peak_lr,
        optimizer.radius - float(optimizer.path_length.max()),
        optimizer._position,
        optimizer.total_steps,
        state,
    )
    optimizer.param_groups[0]["lr"] = optimizer._scheduled_lr()
