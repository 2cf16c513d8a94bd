"""Random plans of a run, random savers and a random interruption: nothing is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import Regressor, trainer, weights
from helpers.hooks import HOOKS
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from helpers.runs import is_borrowed
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig
from lightning_twa.candidates import find_files, read_file

LOSING = ("on_train_epoch_start", "on_train_batch_start")  # resumed there, Lightning skips a part
WITHIN = ("on_train_batch_start", "on_train_batch_end")
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "last": {"save_last": True},
    "every": {"save_top_k": -1, "every_n_epochs": 1},
    "best": {"monitor": "val_loss", "save_last": True},
    "steps": {"save_top_k": -1, "every_n_train_steps": 2},
    "at the end": {"save_top_k": -1, "save_on_train_epoch_end": True},
}
ENDS = ("exception", "Ctrl+C", "kill")


class Planned(Exception):
    """What ends a run."""


@dataclass(frozen=True)
class Plan:
    """One run, what is saved in it and where it is interrupted."""

    twa: dict[str, Any]
    trainer: dict[str, Any]
    savers: tuple[tuple[str, bool], ...]  # a hook, and whether before the callback
    checkpoints: str | None
    checkpoints_first: bool
    end: str
    at: tuple[str, int, bool]  # a hook, how often it came, and whether before the callback
    batchnorm: bool
    same_trainer: bool


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from(["phase", "phase", "steps", "both", "uniform", "cycles"]))
    collect: dict[str, Any] = {"start": draw(st.integers(0, 1))}
    by_steps = draw(st.booleans())
    if by_steps:
        collect["every_n_train_steps"] = draw(
            st.sampled_from([1, 2] if kind == "cycles" else [1, 3])
        )
    if draw(st.booleans()):
        collect["ema_decays"] = draw(st.sampled_from([(0.5,), (0.5, 0.9)]))
    if draw(st.integers(0, 3)) == 0:
        collect["max_candidates"] = draw(st.integers(2, 4))
    twa: dict[str, Any] = {
        "start_epoch": {"cycles": 2}.get(kind, draw(st.integers(3, 5))),
        "validate_average": draw(st.booleans()),
        "storage": StorageConfig(kind=draw(st.sampled_from(["memory", "disk"]))),
    }
    if kind in ("steps", "both"):
        twa["phase_steps"] = draw(st.sampled_from([2, 3, 5, 0.2]))
        twa["start_epoch"] = None if kind == "steps" else twa["start_epoch"]
    if kind == "uniform":
        twa["solver"] = SolverConfig(name="uniform")
        collect.pop("ema_decays", None)
    else:
        twa["data"] = draw(st.sampled_from(["train", "train", "val"]))
        twa["solver"] = SolverConfig(name=draw(st.sampled_from(["full_matrix_adam", "adamw"])))
        subspace = draw(
            st.sampled_from(
                [
                    {},
                    {"bits": 4},
                    {"blocks": "tensor"},
                    {"parametrization": "simplex"},
                    {"basis": "orthonormal"},
                    {"group_size": 2},
                    {"parametrization": "mask"},
                    {"rank": 1},
                ]
            )
        )
        if kind == "cycles":
            twa["cycles"] = 2
            collect["start"] = 0
            subspace = {name: value for name, value in subspace.items() if name != "group_size"}
        if "basis" in subspace:
            twa["solver"] = SolverConfig(lr=0.1)
        twa["subspace"] = SubspaceConfig(**subspace)
    twa["collect"] = CollectConfig(**collect)
    masked = twa.get("subspace", SubspaceConfig()).parametrization == "mask"
    accumulate = 1 if masked else draw(st.sampled_from([1, 1, 2]))
    hooks = [h for h in HOOKS if accumulate == 1 or h not in WITHIN]
    at = draw(st.sampled_from(HOOKS))
    times = {"on_train_start": 1, "on_train_batch_start": 32, "on_train_batch_end": 32}.get(at, 8)
    validated = draw(
        st.sampled_from(["each epoch", "each epoch", "every second", "twice", "never"])
    )
    if validated == "never" and twa.get("data") != "val":
        at = at.replace("validation", "train_epoch")
    how = (
        {
            "every second": {"check_val_every_n_epoch": 2},
            "twice": {"val_check_interval": 0.5},
            "never": {"limit_val_batches": 0},
        }.get(validated, {})
        if twa.get("data") != "val" or validated != "never"
        else {}
    )
    return Plan(
        twa=twa,
        trainer={
            "max_epochs": 8,
            "accumulate_grad_batches": accumulate,
            **how,
        },
        savers=tuple(
            draw(
                st.lists(st.tuples(st.sampled_from(hooks), st.booleans()), max_size=2, unique=True)
            )
        ),
        checkpoints=draw(
            st.none()
            | st.sampled_from(sorted(k for k in CHECKPOINTS if k != "best" or validated != "never"))
        ),
        checkpoints_first=draw(st.booleans()),
        end=draw(st.sampled_from(ENDS)),
        at=(at, draw(st.integers(1, times)), draw(st.booleans())),
        batchnorm=draw(st.booleans()),
        same_trainer=draw(st.booleans()),
    )


class Save(L.Callback):
    """Saves in a hook, whenever it comes."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.hook, self.folder, self.count = hook, folder, 0
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.count += 1
            trainer.save_checkpoint(self.folder / f"{self.hook}-{id(self)}-{self.count}.ckpt")


class End(L.Callback):
    """Ends the run in a hook."""

    def __init__(self, hook: str, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0
        setattr(self, hook, self.end)

    def end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.sanity_checking:
            return
        self.count += 1
        if self.count == self.at:
            if self.how == "kill":
                os._exit(9)
            raise KeyboardInterrupt if self.how == "Ctrl+C" else Planned


class Watch(L.Callback):
    """The weights that training goes on from, by optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = defaultdict(list)

    def note(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.seen[trainer.global_step].append(weights(module))

    on_train_start = on_train_epoch_start = on_train_batch_start = note
    on_train_batch_end = on_train_epoch_end = note


@dataclass
class Run:
    """One ``fit`` and what is there after it."""

    trainer: L.Trainer
    twa: TWACallback
    module: Regressor
    watch: Watch
    ended: bool = True

    @property
    def wrote(self) -> bool:
        """Whether it finished the average itself, and did not load it."""
        return self.ended and max(self.watch.seen, default=0) > min(self.watch.seen, default=0)

    @property
    def outcome(self) -> Any:
        path = self.twa.averaging_path
        return (
            state(self.module),
            self.twa.phase,
            self.twa.averaging_weights,
            self.twa.candidate_names,
            [] if path is None else list(path),
        )


def begin(plan: Plan, folder: Path, *, saves: bool, ends: bool, save_average: Any = True) -> Run:
    L.seed_everything(1, verbose=False)
    twa = TWACallback(**plan.twa, save_average=save_average)
    watch = Watch()
    before, behind = [], []
    if saves:
        for hook, first in plan.savers:
            (before if first else behind).append(Save(hook, folder))
        if plan.checkpoints is not None:
            saver = ModelCheckpoint(folder, "{epoch}-{step}", **CHECKPOINTS[plan.checkpoints])
            (before if plan.checkpoints_first else behind).append(saver)
    if ends:
        hook, at, first = plan.at
        (before if first else behind).append(End(hook, at, plan.end))
    the_trainer = trainer(
        folder,
        callbacks=[*before, twa, *behind, watch],
        enable_checkpointing=saves and plan.checkpoints is not None,
        **plan.trainer,
    )
    return Run(the_trainer, twa, Regressor(plan.batchnorm), watch)


def go(run: Run, ckpt_path: Path | None = None) -> Run:
    run.ended = False
    with contextlib.suppress(Planned, SystemExit, KeyboardInterrupt):
        run.trainer.fit(run.module, ordered(), ordered(32, seed=1), ckpt_path=ckpt_path)
        run.ended = True
    return run


def resumable(folder: Path) -> list[Path]:
    """Checkpoints to go on from, oldest first."""
    files = [p for p in folder.glob("*.ckpt") if "twa" not in p.name]
    return sorted(files, key=lambda p: p.stat().st_mtime_ns)


def check_finished(run: Run) -> None:
    """The result is in the model, in the callback and in a file."""
    assert run.twa.phase == "done"
    assert equal(run.twa.average_state_dict(), state(run.module))
    if run.trainer.checkpoint_callbacks and run.wrote:
        held = torch.load(str(run.twa.average_path), weights_only=True)
        assert equal(dict(held["state_dict"]), state(run.module))
        assert held["callbacks"]["TWACallback"]["phase"] == "done"


def check_left_behind(plan: Plan, folder: Path) -> None:
    """No half of a file, and candidates that can be read."""
    assert not [p for p in folder.rglob("*") if p.suffix == ".tmp" or p.name.startswith(".")]
    for directory in {p.parent for p in (folder / "twa_candidates").rglob("*.safetensors")}:
        assert all(read_file(path) for path in find_files(directory))


def check_interrupted(plan: Plan, run: Run, plain: Run) -> None:
    """The Trainer is the user's again, with the weights that training goes on from."""
    assert not (run.trainer.optimizers and is_borrowed(run.trainer))
    assert [type(c.scheduler).__name__ for c in run.trainer.lr_scheduler_configs] == (
        ["StepLR"] if run.trainer.optimizers else []
    )
    seen = plain.watch.seen[run.trainer.global_step]
    assert any(torch.equal(weights(run.module), w) for w in seen), "raw weights"


def check(plan: Plan, folder: Path) -> None:
    """Everything that a plan promises."""
    plain = go(begin(plan, folder / "plain", saves=False, ends=False))
    check_finished(plain)
    saving = go(begin(plan, folder / "saving", saves=True, ends=False))
    assert equal(saving.outcome, plain.outcome), "a save changes nothing"
    check_finished(saving)
    check_left_behind(plan, folder / "saving")

    broken = folder / "broken"
    broken.mkdir()
    if plan.end == "kill":
        context = multiprocessing.get_context("fork")
        process = context.Process(
            target=lambda: go(begin(plan, broken, saves=True, ends=True)), daemon=True
        )
        process.start()
        process.join()
        run, ended = None, process.exitcode == 0
    else:
        run = go(begin(plan, broken, saves=True, ends=True))
        ended = run.ended
    files = resumable(broken)
    shutil.copytree(broken, folder / "kept")
    if run is not None and not ended:
        check_interrupted(plan, run, plain)
        check_left_behind(plan, broken)
        if plan.same_trainer and run.twa.phase != "done":
            steps = run.trainer.global_step
            go(run)
            assert run.ended
            if run.trainer.global_step > steps:
                check_finished(run)
    for path in {*files[-1:], *files[:: max(1, len(files) // 2)][:1]}:
        drops = plan.twa["collect"].max_candidates is not None or "cycles" in plan.twa
        if path != files[-1] and drops:
            continue  # the files of dropped candidates live as long as two checkpoints
        with contextlib.ExitStack() as stack:
            copy = folder / "again"
            shutil.copytree(folder / "kept", copy)
            stack.callback(shutil.rmtree, copy)
            for other in resumable(copy):
                other.unlink() if other.name != path.name else None
            again = go(begin(plan, copy, saves=True, ends=False), copy / path.name)
            if path.name.startswith(LOSING):
                continue
            assert equal(again.outcome, plain.outcome), f"resumed from {path.name}"
            check_finished(again)


def run_plan(plan: Plan) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PROFILE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=6, **PROFILE)
@given(plans())
def test_random_plans_lose_nothing(plan: Plan) -> None:
    run_plan(plan)


@pytest.mark.long
@settings(max_examples=50, **PROFILE)
@given(plans())
def test_many_random_plans_lose_nothing(plan: Plan) -> None:
    run_plan(plan)
