"""The runs of the claims benchmark: a group is the rows of a task and seed that are made together.

All runs of a task take the same optimizer steps; the phase of TWA is the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from claims_runs import (
    Drop,
    Recorder,
    Row,
    default_phase,
    paper_phase,
    profiles,
    scores,
)
from claims_tasks import Task, cosine, fit

from lightning_twa import CollectConfig, SolverConfig, SubspaceConfig, TWACallback

TWA = "TWA"
PAPER = "TWA, the paper's phase, nothing chosen"
DROP = "learning-rate drop of the phase's length"
LONG_DROP = "learning-rate drop, the paper's phase"
COSINE = "full schedule: cosine to 0"
WHOLE = "twice the steps: the rest of the schedule"

Rows = dict[str, Row]
Group = dict[str, Any]  # "rows", and in "notes" what else a run says

NO_POWERS = CollectConfig(power_averages=())


def fixed(task: Task, seed: int) -> Group:
    """Every fixed average and the learning-rate drops, from one ordinary run."""
    data, steps = task.data(seed), task.total
    phases = {DROP: default_phase(steps), LONG_DROP: paper_phase(task)}
    if task.kind == "rate":
        phases = {}
    recorder = Recorder(profiles(steps, task.interval))
    drops = {
        title: Drop(task.module(seed), steps - phase, phase) for title, phase in phases.items()
    }
    whole = task.kind == "main" and task.epochs > task.run
    module = task.module(seed)
    fit(module, data, task.epochs if whole else task.run, [recorder, *drops.values()])
    rows = {title: scores(drop.module, data, "drop", steps) for title, drop in drops.items()}
    if whole:
        rows[WHOLE] = scores(module, data, "whole", task.epochs * task.steps)
    for title in recorder.titles:
        recorder.put(title, module, data)
        rows[title] = scores(module, data, "fixed", steps)
    return {"rows": rows, "notes": {"phase": default_phase(steps), "long": paper_phase(task)}}


def full_schedule(task: Task, seed: int) -> Group:
    """The same steps with a learning rate that falls to 0; the time of an ordinary run, too."""
    data, steps = task.data(seed), task.total
    recipe = dataclasses.replace(task.recipe, schedule=cosine)
    module = task.module(seed, recipe, steps)
    seconds = fit(module, data, task.run)
    return {
        "rows": {COSINE: scores(module, data, "schedule", steps)},
        "notes": {"ordinary_seconds": seconds},
    }


def learned(task: Task, seed: int, title: str, **arguments: Any) -> Group:
    """A run with the callback, and what its result says."""
    twa = TWACallback(**arguments)
    module, data = task.module(seed), task.data(seed)
    seconds = fit(module, data, task.run, [twa])
    result = twa.result
    if arguments.get("heldout", "auto") and not result.losses:
        raise RuntimeError(f"{task.name}, {title}: nothing was measured by held-out data.")
    return {
        "rows": {title: scores(module, data, "learned", task.total)},
        "notes": {
            "start": str(result.start),
            "accepted": str(result.accepted),
            "steps": result.steps,
            "losses": dict(result.losses),
            "phase_seconds": result.phase_seconds,
            "measuring_seconds": result.measuring_seconds,
            "seconds": seconds,
        },
    }


def twa(task: Task, seed: int) -> Group:
    """``TWACallback()``.

    Raises:
        RuntimeError: Where learning-rate drops would not be as long as its phase.
    """
    group = learned(task, seed, TWA)
    steps, expected = group["notes"]["steps"], default_phase(task.total)
    if steps != expected:
        raise RuntimeError(f"{task.name}: the phase took {steps} steps, the drop {expected}.")
    return group


def paper(task: Task, seed: int) -> Group:
    """Five epochs of phase from the mean of the snapshots; the result is its last point."""
    collect = NO_POWERS
    if task.run == 1:
        collect = dataclasses.replace(collect, every_n_train_steps=task.interval)
    return learned(task, seed, PAPER, phase_steps=paper_phase(task), heldout=None, collect=collect)


def solver(radius: float) -> dict[str, Any]:
    """A radius alone."""
    return {"solver": SolverConfig(radius=radius)}


PER_TENSOR = SubspaceConfig(blocks="tensor")
# Settings that --study compares, on seeds that are not reported.
STUDY: dict[str, dict[str, Any]] = {
    "default": {},
    "radius 0.5": solver(0.5),
    "radius 1": solver(1.0),
    "radius 2": solver(2.0),
    "radius 4": solver(4.0),
    "8 steps": {"phase_steps": 8},
    "16 steps": {"phase_steps": 16},
    "64 steps": {"phase_steps": 64},
    "a fifth of the run": {"phase_steps": 0.2},
    "per tensor": {"subspace": PER_TENSOR},
    "per tensor, radius 2": {"subspace": PER_TENSOR, **solver(2.0)},
    "snapshots alone": {"collect": NO_POWERS},
    "power averages alone": {"collect": CollectConfig(every_n_epochs=None)},
    "eight snapshots": {"collect": CollectConfig(max_candidates=8)},
    "nothing chosen": {"heldout": None},
    "trained on held-out data": {"data": "val"},
}


def study(task: Task, seed: int, setting: str) -> Group:
    """One setting."""
    return learned(task, seed, f"{TWA}, {setting}", **STUDY[setting])


GROUPS: dict[str, Callable[[Task, int], Group]] = {
    "fixed": fixed,
    "twa": twa,
    "paper": paper,
    "cosine": full_schedule,
}


def groups_of(task: Task) -> list[str]:
    """What a task is compared by; of another learning rate only what the table of rates has."""
    return ["fixed", "twa"] if task.kind == "rate" else list(GROUPS)
