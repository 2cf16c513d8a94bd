"""A phase that is resumed reads its subspace from a file, and is the same as without."""

from __future__ import annotations

import itertools
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_twa
from helpers import ddp, sharded
from helpers.common import Regressor, trainer
from helpers.plain import CollectConfig
from helpers.resume import differences, equal, interrupted, ordered, run, saved, twa
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig, average
from lightning_twa.candidates import SubspaceFiles, disk, find_files
from lightning_twa.commands import inspect
from lightning_twa.phases import span
from lightning_twa.phases.step_watch import StepWatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]

STORAGES = {"memory": {"kind": "memory"}, "files": {"kind": "disk"}}
CASES: dict[str, dict[str, Any]] = {
    "32 bits": {},
    "16 bits": {"subspace": SubspaceConfig(bits=16)},
    "8 bits": {"subspace": SubspaceConfig(bits=8)},
    "4 bits, a block per tensor": {"subspace": SubspaceConfig(bits=4, blocks="tensor")},
    "1 bit": {"subspace": SubspaceConfig(bits=1)},
    "orthonormal": {
        "subspace": SubspaceConfig(basis="orthonormal"),
        "solver": SolverConfig(name="sgd", lr=0.05),
    },
    "the paper's basis": {
        "subspace": SubspaceConfig(basis="candidates"),
        "solver": SolverConfig(name="sgd", lr=0.05),
    },
    "simplex": {
        "subspace": SubspaceConfig(parametrization="simplex", basis="candidates"),
        "solver": SolverConfig(name="adamw", lr=0.1),
    },
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "a start of its own": {"heldout": "auto", "collect": lightning_twa.CollectConfig(start=0)},
    "groups, with a start of its own": {
        "heldout": "auto",
        "collect": lightning_twa.CollectConfig(start=0),
        "subspace": SubspaceConfig(group_size=3),
    },
    "candidates in bfloat16": {},
    "TWA-v": {"data": "val"},
}


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("subspace*/**/*.*"))


def cached(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Arguments of the callback."""
    options = {"dirpath": str(folder), "kind": "memory", "cache_subspace": True}
    return {"storage": StorageConfig(**{**options, **kwargs})}


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: Any) -> None:
        raise AssertionError("the subspace was built")

    monkeypatch.setattr(span, "build", build)


@pytest.mark.matrix(12)
@pytest.mark.parametrize(
    ("case", "storage"),
    [
        pytest.param(c, s, marks=[] if s == "files" or c == "32 bits" else pytest.mark.long)
        for c, s in itertools.product(CASES, STORAGES)
    ],
)
def test_what_is_resumed_with_the_file_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, storage: str
) -> None:
    """And is read: with groups, of the group that the checkpoint is in, where its file is there."""
    dtype = "bfloat16" if "bfloat16" in case else "float32"
    options = {**CASES[case], **cached(tmp_path / "c", dtype=dtype, **STORAGES[storage])}

    def make() -> Any:
        return twa(**deepcopy(options))

    saver = CopyingSaver(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1)
    saver.candidates = tmp_path / "c"
    whole = run(tmp_path, Regressor, make, saver=saver)
    assert files(tmp_path / "c") == []
    end = 20 if case == "TWA-v" else 24
    in_phase = [path for path in saved(tmp_path / "saved") if 16 < _step(path) < end]
    assert len(in_phase) == end - 17
    for path in in_phase[::3]:
        saver.put_back()
        with monkeypatch.context() as patch:
            if "groups" not in case:  # the next group has to be built
                forbid_building(patch)
            resumed = run(tmp_path, Regressor, make, ckpt_path=path)
        for outcome in (whole, resumed):
            result = outcome.callback.get("result", {})
            result.update(phase_seconds=0.0, measuring_seconds=0.0)  # by the clock
            result["gain_error"] = str(result.get("gain_error"))  # NaN, of one batch
        assert not differences(whole, resumed), path
        assert len(files(tmp_path / "c")) == len(files(saver.kept)) - 1
        for folder in (tmp_path / "c").glob("subspace_*"):
            shutil.rmtree(folder)


class CopyingSaver(ModelCheckpoint):
    """Keeps the files of subspaces too, which the end of the phase deletes."""

    candidates = Path()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self._copy(self.candidates, self.kept)

    @property
    def kept(self) -> Path:
        return Path(self.dirpath) / "subspaces"

    def put_back(self) -> None:
        assert files(self.kept), "none was written"
        self._copy(self.kept, self.candidates)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        for name in files(source):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())


def _step(path: Path) -> int:
    return int(path.stem.rpartition("step=")[2])


class InPhase(L.Callback):
    """Interrupts a run in the phase, in its fifth epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 5:
            raise KeyError("planned")


def interrupted_in_phase(tmp_path: Path, **kwargs: Any) -> tuple[Any, Path]:
    """What a run would have ended with, and its checkpoint of the phase; the file is there."""
    options = {**cached(tmp_path / "c"), **kwargs}
    whole = run(tmp_path, Regressor, lambda: twa(**kwargs))
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_on_train_epoch_end=True)
    L.seed_everything(1, verbose=False)
    the_trainer = trainer(
        tmp_path, callbacks=[twa(**options), saver, InPhase()], enable_checkpointing=True
    )
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(Regressor(), ordered(), ordered(32, seed=1))
    assert len(files(tmp_path / "c")) == 1
    return whole, saved(tmp_path / "saved")[4]


DAMAGES = {
    "is missing": lambda path: path.unlink(),
    "it is truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "its SHA-256 is another one": lambda path: _flip(path),
    "is not a regular file": lambda path: (path.unlink(), path.mkdir()),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("said", DAMAGES)
def test_a_file_that_cannot_be_used_costs_time_only(tmp_path: Path, caplog: Any, said: str) -> None:
    whole, path = interrupted_in_phase(tmp_path)
    (name,) = files(tmp_path / "c")
    DAMAGES[said](tmp_path / "c" / name)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed = run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")), ckpt_path=path)
    (line,) = [r.message for r in caplog.records if "built again" in r.message]
    assert said in line
    assert not any(word in line for word in ("Restore", "Error", "candidate"))
    assert not differences(whole, resumed)


def test_a_file_of_another_subspace_is_not_used(tmp_path: Path, caplog: Any) -> None:
    """Whose digest is right: somebody has put another reference into the checkpoint."""
    _, path = interrupted_in_phase(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [s for key, s in checkpoint["callbacks"].items() if "TWA" in key]
    assert len(state["subspace"]) == 1
    state["mixing"][0, 0, 0] += 1e-15
    torch.save(checkpoint, path)
    with caplog.at_level(logging.INFO):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")), ckpt_path=path)
    assert any("what it is built of has changed" in r.message for r in caplog.records)
    assert len(files(tmp_path / "c")) == 1, "it may belong to another run"


@pytest.mark.parametrize("later", [True, False])
def test_the_option_may_be_set_or_not_when_a_run_is_resumed(tmp_path: Path, later: bool) -> None:
    options = [cached(tmp_path / "c"), {}]
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run(tmp_path, Regressor, lambda: twa(**options[later]), saver=saver)
    path = saved(tmp_path / "saved")[4]
    resumed = run(tmp_path, Regressor, lambda: twa(**options[not later]), ckpt_path=path)
    assert not differences(whole, resumed)


def test_what_was_interrupted_goes_on_in_the_same_process_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, interrupt = twa(**cached(tmp_path / "c")), InPhase()
    the_trainer = trainer(tmp_path, callbacks=[callback, interrupt])
    module = Regressor()
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(module, ordered(), ordered(32, seed=1))
    the_trainer.callbacks.remove(interrupt)
    forbid_building(monkeypatch)
    the_trainer.fit(module, ordered(), ordered(32, seed=1))
    assert callback.phase == "done"
    assert files(tmp_path / "c") == []


@pytest.mark.parametrize("why", ["No space left on device", "the candidate"])
def test_a_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    whole = run(tmp_path, Regressor, twa)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(why)

    monkeypatch.setattr(disk, "write_candidate", fail)
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match=f"subspace could not be written to .*{why}"):
        found = run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")), saver=saver)
    assert not differences(whole, found)
    checkpoint = torch.load(saved(tmp_path / "saved")[4], weights_only=True)
    (state,) = [s for key, s in checkpoint["callbacks"].items() if "TWA" in key]
    assert "subspace" not in state
    assert files(tmp_path / "c") == []


def test_a_directory_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ValueError, match=r"cache_subspace=True\) writes to .*Set StorageConfig"):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")))


def test_a_uniform_average_has_no_subspace(tmp_path: Path) -> None:
    solver = SolverConfig(name="uniform")
    run(tmp_path, Regressor, lambda: twa(start_epoch=None, solver=solver, **cached(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


def test_a_damaged_reference_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = interrupted(tmp_path, 4, **cached(tmp_path / "c"))
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [s for key, s in checkpoint["callbacks"].items() if "TWA" in key]
    state["subspace"] = "subspace_0"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"damaged.*subspace is 'subspace_0'"):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")), ckpt_path=path)


@pytest.mark.slow
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribute: str) -> None:
    """One file for both, or one for each; all of them or none are used."""
    options = {"distribute": distribute, "subspace": SubspaceConfig(bits=4)}
    storage = cached(tmp_path / "c", kind="disk")
    saver = CopyingSaver(tmp_path / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    saver.candidates = tmp_path / "c"
    how = {"train": ddp.strided(2), "use_distributed_sampler": False}
    whole = ddp.fit(
        tmp_path / "whole",
        twa(**options, **storage),
        ddp.Wide(),
        callbacks=[saver],
        enable_checkpointing=True,
        **how,
    )
    path = tmp_path / "saved" / "epoch=4.ckpt"
    names = files(saver.kept)
    assert len(names) == (2 if distribute == "shard" else 1)
    assert files(tmp_path / "c") == []
    for missing in (False, True):
        saver.put_back()
        if missing:
            (tmp_path / "c" / names[-1]).unlink()
        with monkeypatch.context() as patch:
            if not missing:
                forbid_building(patch)
            resumed = ddp.fit(
                tmp_path / "resumed",
                twa(**options, **storage),
                ddp.Wide(),
                ckpt_path=path,
                **how,
            )
        for a, b in zip(whole, resumed, strict=True):
            assert equal(a["state"], b["state"])
            assert equal(a["averaging_weights"], b["averaging_weights"])


@pytest.mark.slow
@sharded.NEEDS_FSDP2
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:.*torch.distributed.checkpoint.*")
def test_sharded_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of each process."""
    storage = cached(tmp_path / "c", kind="disk")
    how = {"save_to": tmp_path / "saved"}
    monkeypatch.setattr(SubspaceFiles, "delete", lambda self: None)
    whole = sharded.fit(tmp_path / "whole", sharded.Sharded(), 2, storage, **how)
    assert len(files(tmp_path / "c")) == 2
    forbid_building(monkeypatch)
    path = tmp_path / "saved" / "epoch=3.ckpt"
    resumed = sharded.fit(tmp_path / "resumed", sharded.Sharded(), 2, storage, ckpt_path=path)
    for a, b in zip(whole, resumed, strict=True):
        assert len(b["steps"]) == 5
        assert equal(a["steps"][-5:], b["steps"])
        assert equal(a["state"], b["state"])


def test_the_file_is_no_candidate(tmp_path: Path) -> None:
    """Not for those who look at files, nor for those who average them."""
    interrupted_in_phase(tmp_path)
    (name,) = files(tmp_path / "c")
    path = tmp_path / "c" / name
    message = "holds the subspace of a phase"
    for use in (lambda text: inspect.describe(Path(text)), average, find_files):
        with pytest.raises(ValueError, match=message):
            use(str(path))
        with pytest.raises(ValueError, match=message):
            use(str(path.parent))
    other = tmp_path / "c" / "version_0" / "epoch=1.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"")
    assert find_files(str(tmp_path / "c" / "**" / "*.safetensors")) == [other]
    with pytest.raises(ValueError, match=r"of 1 run\(s\).*version_0"):
        find_files(tmp_path / "c")


def test_a_phase_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        assert len(files(tmp_path / "c")) == 1
        raise RuntimeError("planned")

    monkeypatch.setattr(StepWatch, "look", lambda self, module: fail(self))
    with pytest.warns(UserWarning, match="The TWA phase failed in its optimizer step 1"):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path / "c")))
    assert files(tmp_path / "c") == []


@pytest.mark.parametrize("name", ["a.safetensors", "SUBSPACE.safetensors"])
def test_nor_is_it_under_another_name(tmp_path: Path, name: str) -> None:
    interrupted_in_phase(tmp_path)
    (path,) = [tmp_path / "c" / found for found in files(tmp_path / "c")]
    other = path.rename(tmp_path / name)
    for use in (lambda text: inspect.describe(Path(text)), average):
        with pytest.raises(ValueError, match="holds the subspace of a phase"):
            use(str(other))


def test_a_directory_stays_while_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a change of group: of several processes another one may be writing by then."""
    found: list[bool] = []
    write = disk.Disk.write

    def look(self: Any, make: Any) -> Any:
        if self.kind == "subspace" and self.directory is not None:
            found.append(self.directory.is_dir() and not files(tmp_path / "c"))
        return write(self, make)

    monkeypatch.setattr(disk.Disk, "write", look)
    options = {**cached(tmp_path / "c"), "subspace": SubspaceConfig(group_size=2)}
    run(tmp_path, Regressor, lambda: twa(**options, collect=CollectConfig(start=0)))
    assert found == [True]
    assert not list((tmp_path / "c").iterdir())
