"""What the claims benchmark compares: each function gives the rows of one task and seed.

A row holds accuracy in percent and NLL on the test data, the epochs of training it takes, those of
the phase included, and the seconds beyond ordinary training. Candidates are the weights at the
ends of epochs, from files; the phase goes on from the checkpoint of the last of them, so that it
has the candidates and the batches that it has within an ordinary run
(``tests/test_claims.py`` compares the two).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from claims_data import Data, soup_data
from claims_runs import (
    BANK,
    EMA_DECAYS,
    SOUP_RUNS,
    START,
    base_run,
    evaluate,
    load,
    lr_drop,
    reestimate,
    soup_net,
    soup_run,
    soup_runs,
    uniform,
)
from claims_tasks import TASKS, Learner, Task, fit
from torch import Tensor

from lightning_twa import CollectConfig, SolverConfig, SubspaceConfig, TWACallback, average

PHASE = 5  # epochs of the phase, and of the learning-rate drop
STARTS = (15, 25, 30, 35, 45)  # of the phase, for the comparison of budgets
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors of the learning rate
FULL = "full schedule"

Rows = dict[str, dict[str, float]]
State = dict[str, Tensor]


class Runs:
    """The ordinary run of a task and seed, in files, and averages of it.

    Args:
        task: The task.
        seed: The seed.
        folder: Where the files are.
        epochs: How long the run was.
    """

    def __init__(self, task: Task, seed: int, folder: Path, epochs: int, ends: set[int]) -> None:
        self.task, self.seed, self.folder = task, seed, folder
        self.data: Data = task.data(seed)
        base_run(task, seed, folder, until=epochs, checkpoints={end - 1 for end in ends})

    def states(self, first: int, end: int) -> list[State]:
        """Weights at the ends of epochs ``first`` to ``end - 1``."""
        return [load(self.folder / f"epoch={epoch}.pt") for epoch in range(first, end)]

    def module(self, states: list[State], *, trained: bool = False) -> Learner:
        """The model with the uniform average of weights, and BatchNorm statistics for it."""
        module = self.task.module(self.seed)
        module.load_state_dict(uniform(states))
        if not trained:
            reestimate(module, self.data)
        return module

    def last_k(self, end: int) -> Learner:
        """The average of the last k weights, k chosen by the validation NLL."""
        averages = (self.module(self.states(end - k, end)) for k in range(1, end + 1))
        return min(averages, key=self.val_nll)

    def ema(self, end: int) -> Learner:
        """The exponential moving average whose decay has the best validation NLL."""
        files = [self.folder / f"ema={decay}-epoch={end - 1}.pt" for decay in EMA_DECAYS]
        return min((self.module([load(file)]) for file in files), key=self.val_nll)

    def val_nll(self, module: Learner) -> float:
        """On the validation data."""
        return evaluate(module, *self.data.val.tensors)[1]

    def twa(
        self,
        start: int = START,
        data: str = "train",
        *,
        window: int | None = None,
        others: Iterable[Path] = (),
        snapshots: bool = True,
        **settings: Any,
    ) -> Learner:
        """The phase from an epoch on, with the candidates from ``window`` (``None``: halfway)."""
        first = start // 2 if window is None else window
        if not snapshots:
            first = start - 1  # one epoch is the shortest window
        files = [self.folder / f"epoch={epoch}.pt" for epoch in range(first, start - 1)]
        collect = CollectConfig(start=first, checkpoints=[*others, *files] or None)
        twa = TWACallback(start, data, collect=collect, **settings)  # type: ignore[arg-type]
        module = self.task.module(self.seed)
        checkpoint = self.folder / f"epoch={start - 1}.ckpt"
        fit(module, self.task.data(self.seed), start + PHASE, [twa], checkpoint)
        return module

    def bank(self) -> list[Path]:
        """The running averages that the callback would have."""
        return [self.folder / f"bank={decay}.pt" for decay in BANK]


def row(make: Callable[[], Learner], test: tuple[Tensor, ...], epochs: float) -> dict[str, float]:
    """Make a model and test it."""
    began = time.perf_counter()
    module = make()
    seconds = time.perf_counter() - began
    accuracy, nll = evaluate(module, *test)
    return {"accuracy": accuracy, "nll": nll, "epochs": epochs, "seconds": seconds}


def generalization(name: str, seed: int, folder: Path) -> Rows:
    """Claim (i), and (ii) at several budgets: TWA beside everything that averages or anneals."""
    task = TASKS[name]
    runs = Runs(task, seed, folder, task.epochs, set(STARTS))
    test, full = runs.data.test.tensors, task.epochs
    mask, simplex = (SubspaceConfig(parametrization=p) for p in ("mask", "simplex"))
    later = START + PHASE
    makes: dict[str, tuple[Callable[[], Learner], int]] = {
        "TWA-t": (runs.twa, later),
        "TWA-v": (lambda: runs.twa(data="val"), later),
        "TWA-t with running averages": (lambda: runs.twa(others=runs.bank()), later),
        "TWA-t, simplex": (lambda: runs.twa(subspace=simplex), later),
        "TWA-t, mask": (lambda: runs.twa(subspace=mask), later),
        "last iterate": (lambda: runs.module(runs.states(START - 1, START), trained=True), START),
        "uniform over all": (lambda: runs.module(runs.states(0, START)), START),
        "uniform over the last half": (
            lambda: runs.module(runs.states(START // 2, START)),
            START,
        ),
        "last k, k by validation": (lambda: runs.last_k(START), START),
        "EMA, best of three by validation": (lambda: runs.ema(START), START),
        "learning-rate drop": (
            lambda: lr_drop(task, seed, folder / f"epoch={START - 1}.ckpt", PHASE),
            later,
        ),
        FULL: (lambda: runs.module(runs.states(full - 1, full), trained=True), full),
    }
    for start in STARTS:
        end = start + PHASE
        makes |= {
            f"TWA-t@{end}": (functools.partial(runs.twa, start), end),
            f"learning-rate drop@{end}": (
                functools.partial(lr_drop, task, seed, folder / f"epoch={start - 1}.ckpt", PHASE),
                end,
            ),
            f"uniform over the last half@{end}": (
                functools.partial(lambda e: runs.module(runs.states(e // 2, e)), end),
                end,
            ),
            f"EMA, best of three by validation@{end}": (functools.partial(runs.ema, end), end),
        }
    rows = {title: row(make, test, epochs) for title, (make, epochs) in makes.items()}
    drops = [r["seconds"] / PHASE for title, r in rows.items() if "drop@" in title]
    for title, r in rows.items():  # of the whole run; its epochs are as long as those of a drop
        whole = title.startswith(("TWA", "learning-rate drop"))
        r["seconds"] += (r["epochs"] - PHASE * whole) * statistics.median(drops)
    return rows


def rates(name: str, seed: int, folder: Path) -> Rows:
    """How much the learning rate of the collecting run matters."""
    rows: Rows = {}
    for factor in RATES:
        task, make = TASKS[name], TASKS[name].recipe.optimizer
        assert isinstance(make, functools.partial)
        lr = make.keywords["lr"] * factor
        optimizer = functools.partial(make.func, **{**make.keywords, "lr": lr})
        recipe = dataclasses.replace(task.recipe, optimizer=optimizer)
        task = dataclasses.replace(task, recipe=recipe)
        inner = folder / str(factor)
        inner.mkdir()
        runs = Runs(task, seed, inner, START, {START})
        makes: dict[str, Callable[[], Learner]] = {
            "uniform over all": lambda runs=runs: runs.module(runs.states(0, START)),
            "uniform over the last half": lambda runs=runs: runs.module(
                runs.states(START // 2, START)
            ),
            "EMA, best of three by validation": lambda runs=runs: runs.ema(START),
            "TWA-t": runs.twa,
        }
        for title, run in makes.items():
            rows[f"{title}@{factor}"] = row(run, runs.data.test.tensors, START)
    return rows


def soups(name: str, seed: int, folder: Path) -> Rows:
    """Claim (iii): averages of twelve fine-tuning runs."""
    soup_runs(seed, folder)
    settings = json.loads((folder / "runs.json").read_text())
    data = soup_data(seed)
    files = [folder / f"run={i}.pt" for i in range(SOUP_RUNS)]
    best = min(range(SOUP_RUNS), key=lambda i: settings[i]["nll"])

    def made(state: State) -> Learner:
        module = soup_net(seed)
        module.load_state_dict(state)
        return module

    def score(which: int) -> Callable[[State], float]:
        sign = 1 if which == 0 else -1
        return lambda state: sign * evaluate(made(state), *data.val.tensors)[which]

    def learned(where: str, **arguments: Any) -> Learner:
        return learned_soup(seed, files, where, subspace=SubspaceConfig(**arguments))

    def retrained() -> Learner:
        return soup_run(seed, best, settings[best], soup_data(seed, with_validation=True))

    makes: dict[str, Callable[[], Learner]] = {
        "TWA-v": lambda: learned("val"),
        "TWA-v, per tensor": lambda: learned("val", blocks="tensor"),
        "TWA-v, simplex": lambda: learned("val", parametrization="simplex"),
        "TWA-t": lambda: learned("train"),
        "best single by validation": lambda: made(load(files[best])),
        "uniform soup": lambda: made(average(files)),
        "greedy soup by accuracy": lambda: made(average(files, "greedy", score=score(0))),
        "greedy soup by NLL": lambda: made(average(files, "greedy", score=score(1))),
        "best settings, trained on train + validation": retrained,
    }
    return {title: row(make, data.test.tensors, 0) for title, make in makes.items()}


def learned_soup(seed: int, files: list[Path], data: str, **settings: Any) -> Learner:
    """The phase alone, with candidates from files."""
    collect = CollectConfig(checkpoints=[str(file) for file in files])
    module = soup_net(seed)
    twa = TWACallback(0, data, collect=collect, **settings)  # type: ignore[arg-type]
    fit(module, soup_data(seed), PHASE, [twa])
    return module


SOUP_STUDY: dict[str, dict[str, Any]] = {
    f"TWA-v{kind}, R {radius}": {
        "subspace": SubspaceConfig(**arguments),
        "solver": SolverConfig(radius=float(radius)),
    }
    for kind, arguments in (
        ("", {}),
        (", simplex", {"parametrization": "simplex"}),
        (", per tensor", {"blocks": "tensor"}),
        (", simplex per tensor", {"parametrization": "simplex", "blocks": "tensor"}),
    )
    for radius in (1, 2, 4, 8)
}


def soup_study(name: str, seed: int, folder: Path) -> Rows:
    """Settings of a soup beside the best single run, a uniform and a greedy soup."""
    soup_runs(seed, folder)
    data = soup_data(seed)
    files = [folder / f"run={i}.pt" for i in range(SOUP_RUNS)]
    runs = json.loads((folder / "runs.json").read_text())
    best = min(range(SOUP_RUNS), key=lambda i: runs[i]["nll"])

    def made(state: State) -> Learner:
        module = soup_net(seed)
        module.load_state_dict(state)
        return module

    def accuracy(state: State) -> float:
        return evaluate(made(state), *data.val.tensors)[0]

    makes: dict[str, Callable[[], Learner]] = {
        "best single by validation": lambda: made(load(files[best])),
        "uniform soup": lambda: made(average(files)),
        "greedy soup by accuracy": lambda: made(average(files, "greedy", score=accuracy)),
    }
    for title, settings in SOUP_STUDY.items():
        makes[title] = functools.partial(learned_soup, seed, files, "val", **settings)
    return {title: row(make, data.test.tensors, 0) for title, make in makes.items()}


STUDY: dict[str, dict[str, Any]] = {
    "default": {},
    "R 0.5": {"solver": SolverConfig(radius=0.5)},
    "R 1": {"solver": SolverConfig(radius=1.0)},
    "R 4": {"solver": SolverConfig(radius=4.0)},
    "R 1, constant": {"solver": SolverConfig(radius=1.0, schedule="constant")},
    "per tensor": {"subspace": SubspaceConfig(blocks="tensor")},
    "per tensor, R 1": {
        "subspace": SubspaceConfig(blocks="tensor"),
        "solver": SolverConfig(radius=1.0),
    },
    "window: last quarter": {"window": START - START // 4},
    "window: all": {"window": 0},
    "with running averages": {"bank": True},
    "with running averages, R 1": {"bank": True, "solver": SolverConfig(radius=1.0)},
    "running averages alone": {"bank": True, "snapshots": False},
    "running averages alone, R 1": {
        "bank": True,
        "snapshots": False,
        "solver": SolverConfig(radius=1.0),
    },
}


def study(name: str, seed: int, folder: Path) -> Rows:
    """Settings of the phase beside fixed averages, to choose the defaults by."""
    task = TASKS[name]
    runs = Runs(task, seed, folder, START, {START})
    rows: Rows = {}
    test = runs.data.test.tensors
    fixed: dict[str, Callable[[], Learner]] = {
        "uniform over all": lambda: runs.module(runs.states(0, START)),
        "uniform over the last half": lambda: runs.module(runs.states(START // 2, START)),
        "last k, k by validation": lambda: runs.last_k(START),
        "EMA, best of three by validation": lambda: runs.ema(START),
    }
    for title, make in fixed.items():
        rows[title] = row(make, test, START)
    for data in ("train", "val"):
        for title, given in STUDY.items():
            settings = dict(given)
            others = runs.bank() if settings.pop("bank", False) else []
            make = functools.partial(runs.twa, data=data, others=others, **settings)
            rows[f"TWA-{data[0]}, {title}"] = row(make, test, START + PHASE)
    return rows
