"""Checkpoints of earlier versions go on as they would have then, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from earlier_cases import (
    CANDIDATES,
    CASES,
    FIXTURES,
    end_of,
    fit,
    machine,
    ordered,
    path_of,
    trainer,
)
from torch import Tensor

from helpers.plain import TWACallback
from lightning_twa.__main__ import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]

WRITTEN = FIXTURES / "0.1.0"
META = json.loads((WRITTEN / "meta.json").read_text())
RAW_WEIGHTS = "current_model_state"  # what to go on from, where "state_dict" is an average

STAGES = [(name, moment) for name, case in CASES.items() for moment in case.stages]
STILL = [(name, moment) for name, moment in STAGES if moment not in CASES[name].due]
FINISHED = [(name, moment) for name, moment in STILL if CASES[name].stages[moment] == "done"]
each_stage = pytest.mark.parametrize(("name", "moment"), STAGES)


# --- comparing


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every tensor, number and string of nested dicts and lists, by its place."""
    if isinstance(value, dict):
        kind, items = "a dict", list(value.items())
    elif isinstance(value, (list, tuple)):
        kind, items = "a list", list(enumerate(value))
    else:
        return {path: value}
    found: dict[str, Any] = {path: f"{kind} of {len(items)}"}
    for key, inner in items:
        found |= leaves(inner, f"{path}[{key!r}]")
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Of one type and, for tensors, of the same dtype, shape and bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(bits(a), bits(b))
    return type(a) is type(b) and bool(a == b)


def close(a: Any, b: Any) -> bool:
    """The same, where another machine or version than the one of ``a`` has computed ``b``."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return same(a, b)
    try:
        torch.testing.assert_close(b, a, rtol=RTOL, atol=ATOL)
    except AssertionError:
        return False
    return True


# Another processor or torch sums in another order, which moves the last bits of a gradient, and
# training carries them on: with plain instead of vector code by up to 7e-7 here.
RTOL, ATOL = 1e-5, 1e-5
computed = same if {key: META[key] for key in machine()} == machine() else close


def differences(written: Any, now: Any, equal: Callable[[Any, Any], bool] = same) -> list[str]:
    """The places in which two states differ."""
    a, b = leaves(written), leaves(now)
    return [
        place
        for place in sorted(a.keys() | b.keys())
        if not (place in a and place in b and equal(a[place], b[place]))
    ]


# --- going on


class Probe(L.Callback):
    """Before the callback: its state when training starts, and a checkpoint before the first step.

    Args:
        twa: The callback.
        path: Where the checkpoint goes.
    """

    def __init__(self, twa: TWACallback, path: Path) -> None:
        self.twa, self.path = twa, path
        self.state: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.state = copy.deepcopy(self.twa.state_dict())

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.path.exists():
            trainer.save_checkpoint(self.path)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What became of a checkpoint.

    Args:
        written: The checkpoint.
        key: Of the callback's state in it.
        restored: The callback's state before anything happened.
        given: A checkpoint written before the first step or, of a finished run, which takes none,
            at its end.
        end: What the run ended with.
        changed: Files beside the checkpoint that are not as they were.
        twa: The callback, afterwards.
    """

    written: dict[str, Any]
    key: str
    restored: dict[str, Any]
    given: dict[str, Any]
    end: dict[str, Any]
    changed: list[str]
    twa: TWACallback


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def go_on(name: str, moment: str, root: Path) -> Resumed:
    """Resume a checkpoint to its end, with copies of the files that belong to it."""
    case, folder = CASES[name], root / "files"
    shutil.copytree(WRITTEN / name, folder)
    before = contents(folder)
    path = path_of(folder, name, moment)
    twa = case.twa(folder)
    probe = Probe(twa, root / "given.ckpt")
    the_trainer, module = fit(case, folder, root, twa=twa, before=[probe], ckpt_path=path)
    if (name, moment) in FINISHED:
        the_trainer.save_checkpoint(probe.path)
    after = contents(folder)
    return Resumed(
        written=torch.load(path, weights_only=True),
        key=twa.state_key,
        restored=probe.state,
        given=torch.load(probe.path, weights_only=True),
        end=end_of(module, twa),
        changed=[file for file in before if after.get(file) != before[file]],
        twa=twa,
    )


@pytest.fixture(scope="module")
def resume(tmp_path_factory) -> Callable[[str, str], Resumed]:
    """Each checkpoint is gone on from once, for all tests."""

    @functools.cache
    def resume(name: str, moment: str) -> Resumed:
        return go_on(name, moment, tmp_path_factory.mktemp(name))

    return resume


# --- tests


@pytest.mark.matrix(24)
@each_stage
def test_a_state_is_given_out_as_it_was_written(resume, name, moment) -> None:
    resumed = resume(name, moment)
    written = resumed.written["callbacks"][resumed.key]
    assert written["phase"] == CASES[name].stages[moment]
    if moment in CASES[name].due:  # training starts with what changes the state
        given = resumed.restored
    else:
        given = resumed.given["callbacks"][resumed.key]
    assert differences(written, given) == []


@pytest.mark.matrix(28)
@pytest.mark.parametrize(("name", "moment"), STILL)
def test_the_model_and_the_user_s_optimizer_are_as_they_were(resume, name, moment) -> None:
    written, given = resume(name, moment).written, resume(name, moment).given
    assert differences(written["optimizer_states"], given["optimizer_states"]) == []
    without = [{k: v for k, v in s.items() if k != "verbose"} for s in given["lr_schedulers"]]
    assert differences(written["lr_schedulers"], without) == []  # torch 2.4's have "verbose" too
    # In the phase weights are computed from the coefficients again
    weights = written.get(RAW_WEIGHTS, written["state_dict"])
    assert differences(weights, given["state_dict"], computed) == []


@each_stage
def test_a_resumed_run_ends_as_the_uninterrupted_one_did(resume, name, moment) -> None:
    resumed = resume(name, moment)
    expected = torch.load(WRITTEN / name / "end.pt", weights_only=True)
    assert resumed.twa.phase == "done"
    # Gram matrices, and so directions, are summed up in another order since
    assert differences(expected, resumed.end, close) == []


@each_stage
def test_files_beside_a_checkpoint_are_read_and_not_changed(resume, name, moment) -> None:
    resumed = resume(name, moment)
    assert resumed.changed == []
    candidates = resumed.written["callbacks"][resumed.key].get("candidates", {})
    entries = [*candidates.get("given", []), *candidates.get("window", [])]
    in_files = (WRITTEN / name / CANDIDATES).exists()
    assert all(("files" in entry) is in_files for entry in entries)


@pytest.mark.parametrize(("name", "moment"), FINISHED)
def test_a_finished_run_is_judged_with_what_it_learned(tmp_path, resume, name, moment) -> None:
    """By the callback that a ``fit`` has restored, which takes no step, and by a new one that is
    given the state: ``test`` and ``validate`` alone restore the weights only.
    """
    case, resumed = CASES[name], resume(name, moment)
    path = path_of(WRITTEN / name, name, moment)
    own = case.twa(WRITTEN / name)
    own.load_state_dict(resumed.written["callbacks"][resumed.key])
    expected = torch.load(WRITTEN / name / "end.pt", weights_only=True)
    for twa, what in ((resumed.twa, "test"), (own, "validate")):
        module = case.module()
        judge = getattr(trainer(tmp_path, callbacks=[*case.callbacks(), twa]), what)
        judge(module, ordered(48, seed=1), ckpt_path=path, verbose=False)
        assert twa.phase == "done"
        assert differences(expected, end_of(module, twa)) == []


@pytest.mark.matrix(31)
@each_stage
def test_inspect_names_the_phase(capsys, name, moment) -> None:
    assert main(["inspect", str(path_of(WRITTEN / name, name, moment))]) == 0
    out = capsys.readouterr().out
    phase = CASES[name].stages[moment]
    assert f"\nphase: {phase} " in out
    if phase != "done":
        assert ("all there" in out) is (WRITTEN / name / CANDIDATES).exists()


def test_every_file_that_was_written_is_tested() -> None:
    checkpoints = {str(path.relative_to(WRITTEN)) for path in WRITTEN.rglob("*.ckpt")}
    assert checkpoints == {str(path_of(Path(name), name, moment)) for name, moment in STAGES}
    assert META["version"] == WRITTEN.name
