"""What a checkpoint holds of a run, and how to tell that it is not that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMAT_VERSION", "RAW_WEIGHTS", "check_state"]

FORMAT_VERSION = 1
RAW_WEIGHTS = "current_model_state"  # where Lightning's WeightAveraging has them too

# What the solvers keep: full-matrix Adam, AdamW, SGD
MOMENTS = (
    {"step", "exp_avg", "second_moment"},
    {"step", "exp_avg", "exp_avg_sq"},
    {"momentum_buffer"},
)

Check = Callable[[Any], bool]


def check_state(state: Mapping[str, Any]) -> None:
    """Check the callback's state in a checkpoint before anything of it is used.

    Raises:
        ValueError: When another version wrote it, or naming the entry that is missing or is not
            what this package writes.
    """
    version = state.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"The checkpoint holds TWACallback state of format_version={version!r}, but this "
            f"version of lightning-twa reads {FORMAT_VERSION}. Use the version that wrote it."
        )
    phase = state.get("phase")
    if phase not in ("collect", "optimize", "done"):
        raise damaged("phase", phase)
    _check(state, "", {"epoch_batches": _optional(_is_count), "candidate_names": _is_names})
    later = {"cycle": state.get("cycle", 0), "stopped": state.get("stopped", False)}
    _check(later, "", {"cycle": _is_count, "stopped": _is_bool})
    batchnorm = {"batches": None, "step": 0, **_dict_of(state, "batchnorm")}
    _check(batchnorm, "batchnorm.", {"batches": _optional(_is_count), "step": _is_count})
    patterns = {"include": None, "exclude": [], **_dict_of(state, "patterns")}
    _check(patterns, "patterns.", {"include": _optional(_is_names), "exclude": _is_names})
    if phase != "done":
        _check_candidates(state)
    if phase != "collect":
        _check(state, "", {"started": _is_dict})
        started = {"epoch": _is_count, "step": _is_count, "validates_each_epoch": _is_bool}
        _check(state["started"], "started.", {**started, "epoch_batches": _optional(_is_count)})
        later = {"stops_at": 0, "stops_at_step": 0, "steps_in_epoch": 0, **state["started"]}
        later_checks = dict.fromkeys(("stops_at", "stops_at_step", "steps_in_epoch"), _is_count)
        _check(later, "started.", later_checks)
        _check(state, "", {"averaging_weights": _is_numbers(2), "block_names": _is_names})
        weights, blocks = state["averaging_weights"], state["block_names"]
        if 0 in weights.shape or weights.shape != (len(state["candidate_names"]), len(blocks)):
            raise damaged("averaging_weights", weights)
    _check({"raw": {}, **state}, "", {"raw": _is_tensors})
    if "path" in state:
        _check(state, "", {"path": _is_dict})
        path = {"points": _is_numbers(3), "stride": _is_count, "steps": _is_count}
        _check(state["path"], "path.", path)
    if "result" in state:
        _check_result(state["result"], len(state["candidate_names"]))
    if phase == "optimize":
        _check_compared(state.get("heldout", {"fixed": {}, "path": [], "best": {}}))
        _check(state, "", {"optimizer": _is_dict, "mixing": _is_numbers(3), "settings": _is_dict})
        _check({"trained": [], **state}, "", {"trained": _is_names})
        _check({"subspace": [], **state}, "", {"subspace": _is_list})
        n = len(state["candidate_names"])
        if "groups" in state:
            n = state["mixing"].shape[2]
            _check_groups(state["groups"])
        _check_optimizer(state["optimizer"], state["mixing"], n)


def _check_result(result: Any, n: int) -> None:
    """What :class:`~lightning_twa.results.Result` is made of, of ``n`` candidates."""
    if not _is_dict(result):
        raise damaged("result", result)
    averages = _dict_of(result, "averages")
    _check(averages, "result.averages.", dict.fromkeys(averages, _is_floats_of(n)))
    floats = dict.fromkeys(("gain", "gain_error", "phase_seconds", "measuring_seconds"), _is_float)
    counts = {"batches": _is_count, "steps": _is_count, "accepted": _optional(_is_count)}
    words = {"heldout": _optional(_is_str), "reason": _is_str, "start": _optional(_is_str)}
    checks = {**floats, **counts, **words, "losses": _is_floats, "path": _is_list}
    _check(result, "result.", checks)
    _check({"of_batches": None, **result}, "result.", {"of_batches": _optional(_is_count)})
    if set(result) - {"averages", "of_batches"} != set(checks):
        raise damaged("result", sorted(result))
    for i, point in enumerate(result["path"]):
        is_pair = _is_list(point) and len(point) == 2 and _is_count(point[0])
        if not (is_pair and _is_float(point[1])):
            raise damaged(f"result.path[{i}]", point)


def _check_compared(heldout: Any) -> None:
    """Losses on held-out data, of a phase that is under way."""
    if not _is_dict(heldout):
        raise damaged("heldout", heldout)
    _check(heldout, "heldout.", {"fixed": _is_tensors, "path": _is_list, "best": _is_dict})
    for i, point in enumerate(heldout["path"]):
        if not _is_dict(point):
            raise damaged(f"heldout.path[{i}]", point)
        losses = {"step": _is_count, "losses": lambda v: isinstance(v, Tensor) and v.dim() == 1}
        _check(point, f"heldout.path[{i}].", losses)
    if heldout["best"]:
        best = {"raw": torch.zeros(1, 1), **heldout["best"]}
        numbers = {"step": _is_count, "raw": _is_numbers(2), "averaging_weights": _is_numbers(2)}
        _check(best, "heldout.best.", numbers)


def _dict_of(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An entry that there need not be."""
    value = state.get(name, {})
    if not isinstance(value, dict):
        raise damaged(name, value)
    return value


def damaged(entry: str, value: Any) -> ValueError:
    """The error for an entry that is not what this package writes."""
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return ValueError(
        f"The TWACallback state in the checkpoint is damaged, or another program wrote it: "
        f"{entry} is {kind[:100]}. Resume from another checkpoint."
    )


def _check(state: Mapping[str, Any], prefix: str, checks: Mapping[str, Check]) -> None:
    for name, check in checks.items():
        if name not in state:
            raise damaged(f"{prefix}{name}", "missing")
        if not check(state[name]):
            raise damaged(f"{prefix}{name}", state[name])


def _check_candidates(state: Mapping[str, Any]) -> None:
    _check(state, "", {"candidates": _is_dict})
    candidates = state["candidates"]
    _check(candidates, "candidates.", {"window": _is_list, "frozen": _optional(_is_dict)})
    given = {"given": candidates.get("given", [])}
    _check(given, "candidates.", {"given": _is_list})
    for where in ("given", "window"):
        for i, entry in enumerate({**candidates, **given}[where]):
            _check_candidate(f"candidates.{where}[{i}]", entry)
            if entry["name"] not in state["candidate_names"]:
                raise damaged(f"candidates.{where}[{i}].name", entry["name"])
    for key in {"averages", "dense"} & candidates.keys():
        _check_averages(key, candidates[key], "decays", 0)
    if "power" in candidates:
        _check_averages("power", candidates["power"], "widths", 2)  # the mean, and the sum
        _check(candidates["power"], "candidates.power.", {"summed": _is_count})
    if candidates["frozen"] is not None:
        _check_candidate("candidates.frozen", candidates["frozen"])


def _check_averages(key: str, averages: Any, numbers: str, further: int) -> None:
    """Averages over steps: one for each of the numbers, and some further ones."""
    where = f"candidates.{key}"
    if not _is_dict(averages):
        raise damaged(where, averages)
    checks = {"updates": _is_count, numbers: _is_list, "averages": _is_list}
    _check(averages, f"{where}.", checks)
    tensors = averages["averages"]
    if tensors and all(_is_dict(t) and "files" in t for t in tensors):  # of sharded parameters
        for i, entry in enumerate(tensors):
            _check_candidate(f"{where}.averages[{i}]", entry)
        return
    names = [set(t) for t in tensors if _is_tensors(t)]
    if len(names) != len(averages[numbers]) + further or any(n != names[0] for n in names):
        raise damaged(f"{where}.averages", tensors)


def _check_candidate(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise damaged(where, entry)
    _check(entry, f"{where}.", {"name": _is_str})
    if "files" in entry:  # their entries are checked by Reference.from_state()
        _check(entry, f"{where}.", {"files": lambda value: _is_list(value) and len(value) > 0})
        return
    _check(entry, f"{where}.", {"parameters": _is_tensors, "buffers": _is_tensors})
    _check({"as_in_module": [], **entry}, f"{where}.", {"as_in_module": _is_names})


def _check_groups(groups: Any) -> None:
    """Their shapes are compared when the phase is entered."""
    if not _is_dict(groups):
        raise damaged("groups", groups)
    _check(groups, "groups.", {"results": _is_list, "steps_before": _is_count})
    _check({"skipped_before": 0, **groups}, "groups.", {"skipped_before": _is_count})
    for i, result in enumerate(groups["results"]):
        if not _is_numbers(2)(result):
            raise damaged(f"groups.results[{i}]", result)


def _check_optimizer(state: Mapping[str, Any], mixing: Tensor, n: int) -> None:
    blocks, k, candidates = mixing.shape
    if candidates != n:
        raise damaged("mixing", mixing)
    # as many rows as directions or, where averaging weights are parametrized, as candidates
    shapes_of_raw = ((k, blocks), (n, blocks))
    coefficients = {"coefficients": lambda v: _is_numbers(2)(v) and v.shape in shapes_of_raw}
    path = {"path_length": lambda v: _is_numbers(1)(v) and v.shape == (blocks,)}
    counts = {"steps": _is_count, "skipped_steps": _is_count, "lr": _is_real, "solver": _is_dict}
    _check(state, "optimizer.", {**coefficients, **path, **counts})
    later = {"total_steps": None, "peak_lr": 0.0, "position": 0, **state}
    _check(later, "optimizer.", {"total_steps": _optional(_is_count), "peak_lr": _is_real})
    _check(later, "optimizer.", {"position": _is_count})
    solver = state["solver"]
    _check(solver, "optimizer.solver.", {"state": _is_dict, "param_groups": _is_list})
    groups = solver["param_groups"]
    if len(groups) != 1 or not _is_dict(groups[0]) or groups[0].get("params") != [0]:
        raise damaged("optimizer.solver.param_groups", groups)
    rows = state["coefficients"].shape[0]
    shapes = {"second_moment": (blocks, rows, rows), "step": ()}
    for key, moments in solver["state"].items():
        if key != 0 or not _is_dict(moments) or set(moments) not in MOMENTS:
            raise damaged(f"optimizer.solver.state[{key!r}]", moments)
        for name, value in moments.items():
            shape = shapes.get(name, (rows, blocks))
            none_yet = value is None and name == "momentum_buffer"
            if not none_yet and not (_is_numbers(len(shape))(value) and value.shape == shape):
                raise damaged(f"optimizer.solver.state[0][{name!r}]", value)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_numbers(dimensions: int) -> Check:
    def check(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.dim() == dimensions
            and value.is_floating_point()
            and bool(torch.isfinite(value).all())
        )

    return check


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_floats(value: Any) -> bool:
    return (
        isinstance(value, dict) and all(map(_is_str, value)) and all(map(_is_float, value.values()))
    )


def _is_floats_of(n: int) -> Check:
    return lambda value: _is_list(value) and len(value) == n and all(map(_is_float, value))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(t, Tensor) for t in value.values())
