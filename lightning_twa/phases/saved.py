"""What travels in a checkpoint: a run as tensors, numbers, strings, lists and dicts, and back.

The keys are those of :mod:`lightning_twa.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.candidates import leave_out_frozen
from lightning_twa.checkpoint import FORMAT_VERSION, check_state
from lightning_twa.config import Settings
from lightning_twa.phases.averaging import Averaging
from lightning_twa.results import Result

__all__ = [
    "check_settings",
    "complete",
    "dump",
    "go_back",
    "is_of_phase",
    "load",
    "phase_to_keep",
    "unfreeze_as_before",
]

# Of what a phase may have been begun with before these settings were kept
LATER_SETTINGS = {"parametrization": "free", "mask_size": None, "group_size": None}
# What a phase goes on from
KEPT = ("settings", "optimizer", "mixing", "groups", "heldout", "subspace")


def dump(
    averaging: Averaging,
    phase: Literal["collect", "optimize", "done"],
    *,
    stopped: bool = False,
) -> dict[str, Any]:
    """Everything to go on with; empty before a first step counts. A finished phase needs no
    candidates any more.

    Args:
        averaging: The run.
        phase: What it is in.
        stopped: Whether ``EarlyStopping`` wants to end it.
    """
    collector = averaging.collector
    nothing = collector.count == 0 and not collector.averages.has_steps
    if phase == "collect" and nothing and averaging.cycle == 0:
        return {}
    state: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "phase": phase,
        "cycle": averaging.cycle,
        "stopped": stopped or averaging.early_stopped,
        "epoch_batches": averaging.epoch_batches,
        "candidate_names": averaging.candidate_names,
    }
    if averaging.settings.collect.selects:
        state["patterns"] = _patterns(averaging.settings)
    if phase != "done":
        state["candidates"] = averaging.collector.state_dict()
    if phase != "collect":
        state["started"] = dict(averaging.optimization.started)
        if averaging.batchnorm is not None:
            state["batchnorm"] = averaging.batchnorm
    if phase == "optimize":
        state.update(phase_to_keep(averaging) if averaging.kept is None else averaging.kept)
    if phase != "collect" and averaging.raw is not None:
        state["raw"] = averaging.raw
    weights = averaging.averaging_weights
    if weights is not None:
        state.update(averaging_weights=weights, block_names=list(averaging.block_names))
    if phase == "done" and averaging.result is not None and averaging.result.heldout is not None:
        state["result"] = averaging.result.state_dict()
    if averaging.trajectory.points is not None:
        state["path"] = averaging.trajectory.state_dict()
    return state


def phase_to_keep(averaging: Averaging) -> dict[str, Any]:
    """What a phase that is under way goes on from, on the CPU."""
    return {
        "settings": _fixed_settings(averaging.settings),
        **averaging.optimization.state_dict(),
    }


def complete(averaging: Averaging, module: LightningModule, state: dict[str, Any]) -> None:
    """Leave frozen parameters that are as in the module out, and name what the phase trains.

    Args:
        averaging: The run.
        module: The model.
        state: From :func:`dump`; changed in place.
    """
    if "candidates" in state and not averaging.store.shards:
        leave_out_frozen(state["candidates"], module)
    if state.get("phase") == "optimize":
        state["trained"] = [n for n, p in module.named_parameters() if p.requires_grad]


def unfreeze_as_before(module: LightningModule, state: Mapping[str, Any]) -> None:
    """Resumed inside the phase: let what had gradients have them again. ``BackboneFinetuning``
    freezes before every ``fit`` and unfreezes at one epoch only. This comes before DDP wraps
    the model, which then synchronizes these gradients.

    Args:
        module: The model.
        state: As :func:`complete` left it; one of an earlier version changes nothing.
    """
    check_state(state)
    if state["phase"] == "optimize":
        parameters = dict(module.named_parameters())
        for name in parameters.keys() & state.get("trained", []):
            parameters[name].requires_grad_(True)


def load(averaging: Averaging, state: dict[str, Any]) -> None:
    """Go on from :func:`dump`.

    Raises:
        ValueError: When the state has another format or is damaged, or the phase another subspace
            or solver, or the run fewer cycles.
    """
    check_state(state)
    cycle, phase = state.get("cycle", 0), state["phase"]
    if cycle >= averaging.settings.cycles:
        raise ValueError(
            f"The checkpoint is in cycle {cycle + 1} of a run, but cycles="
            f"{averaging.settings.cycles}. Resume with the same settings."
        )
    if phase != "done":
        _check_patterns(averaging.settings, state)
    kept = None
    if phase == "optimize":
        kept = {key: state[key] for key in KEPT if key in state}
        check_settings(averaging.settings, kept, "checkpoint's phase")
    averaging.forget_model()
    averaging.kept = kept
    averaging.collector.cycle = cycle
    averaging.early_stopped = state.get("stopped", False)
    averaging.epoch_batches = state["epoch_batches"]
    averaging.batchnorm = state.get("batchnorm")
    averaging.restored_names = list(state["candidate_names"])
    if "candidates" in state:
        averaging.collector.load_state_dict(
            state["candidates"],
            complete=phase != "collect",
            verify=kept is None or not _reads_subspace(averaging.settings, kept),
        )
    averaging.learned = state.get("averaging_weights")
    averaging.raw = state.get("raw")
    averaging.result = Result.from_state(state["result"]) if "result" in state else None
    averaging.block_names = list(state.get("block_names", []))
    if "path" in state:
        averaging.trajectory.load_state_dict(state["path"])
    if phase != "collect":
        averaging.optimization.started = dict(state["started"])


def _reads_subspace(settings: Settings, kept: Mapping[str, Any]) -> bool:
    """Whether a phase may go on, and end, without the values of its candidates. With groups of them
    it needs them at the next group, and where coefficients are not free it may end with an average
    that they do not give.
    """
    free = settings.subspace.parametrization == "free" and "groups" not in kept
    return free and settings.storage.cache_subspace and bool(kept.get("subspace"))


def _patterns(settings: Settings) -> dict[str, Any]:
    """Which parameters are averaged, of what a checkpoint may hold."""
    collect = settings.collect
    include = None if collect.include is None else list(collect.include)
    return {"include": include, "exclude": list(collect.exclude)}


def _check_patterns(settings: Settings, state: Mapping[str, Any]) -> None:
    """Running averages are of some parameters, and a phase spans these."""
    before = state.get("patterns", {"include": None, "exclude": []})
    now = _patterns(settings)
    if before != now:
        raise ValueError(
            f"The checkpoint's run averages CollectConfig(include={before['include']!r}, "
            f"exclude={before['exclude']!r}), but this callback has include={now['include']!r}, "
            f"exclude={now['exclude']!r}. Resume with the same."
        )


def is_of_phase(averaging: Averaging, state: Mapping[str, Any]) -> bool:
    """Whether a state is of the phase that is under way."""
    names = averaging.candidate_names
    return state["phase"] == "optimize" and list(state["candidate_names"]) == names


def go_back(averaging: Averaging, trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Within a phase: go on from a state of it."""
    optimization, module = averaging.optimization, trainer.lightning_module
    averaging.trajectory.load_state_dict(state["path"])
    optimization.enter(trainer, module, averaging.store, {k: state[k] for k in KEPT if k in state})


def check_settings(settings: Settings, kept: Mapping[str, Any], what: str) -> None:
    """Check that a phase goes on with what it was begun with.

    Args:
        settings: Of the callback now.
        kept: From :func:`phase_to_keep`.
        what: Whose phase, for the error.

    Raises:
        ValueError: Naming the settings that differ.
    """
    begun, now = {**LATER_SETTINGS, **kept["settings"]}, _fixed_settings(settings)
    others = [name for name in now if name in begun and begun[name] != now[name]]
    if others:
        raise ValueError(
            f"The {what} was started with "
            + ", ".join(f"{name}={begun[name]!r}" for name in others)
            + ", but this callback has "
            + ", ".join(f"{name}={now[name]!r}" for name in others)
            + ". Resume with the same settings."
        )


def _fixed_settings(settings: Settings) -> dict[str, Any]:
    """The settings without which a phase cannot go on as it began."""
    subspace, solver = settings.subspace, asdict(settings.solver)
    return {
        "data": settings.data,
        "basis": subspace.basis,
        "blocks": subspace.blocks,
        "rank": subspace.rank,
        "bits": subspace.bits,
        "parametrization": subspace.parametrization,
        "mask_size": subspace.mask_size,
        "group_size": subspace.group_size,
        "solver": solver.pop("name"),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in solver.items()},
    }
