"""Runs with any settings, stopped anywhere or killed, go on as one that was not."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, ordered, run
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a run of 6 epochs of 4 batches, and the batches after which it is stopped."""
    start = draw(st.integers(2, 5))
    by_steps = draw(st.booleans())
    collect = {"start": draw(st.integers(0, start - 2))}
    collect |= {"every_n_train_steps": draw(st.integers(1, 2))} if by_steps else {}
    collect |= {"max_candidates": draw(st.sampled_from([None, 2, 3]))}
    basis = draw(st.sampled_from(["pca", "pca", "candidates", "orthonormal"]))
    solver: dict[str, Any] = {"name": draw(st.sampled_from(["full_matrix_adam", "adamw"]))}
    solver |= {} if basis == "pca" else {"lr": 0.05}
    return {
        "twa": {
            "start_epoch": start,
            "data": draw(st.sampled_from(["train", "val"])),
            "collect": CollectConfig(**collect),
            "solver": SolverConfig(**solver),
            "subspace": SubspaceConfig(
                basis=basis,
                bits=draw(st.sampled_from([32, 16, 4, 3])),
                blocks=draw(st.sampled_from(["global", "tensor", 20])),
            ),
            "validate_average": draw(st.booleans()),
        },
        "storage": draw(st.sampled_from(["memory", "disk"])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "trainer": {
            "accumulate_grad_batches": draw(st.sampled_from([1, 2])),
            "precision": draw(st.sampled_from(["32-true", "bf16-mixed"])),
            "gradient_clip_val": draw(st.sampled_from([None, 0.5])),
        },
        "batchnorm": draw(st.booleans()),
        "stops": draw(st.lists(st.integers(0, 20), min_size=1, max_size=2, unique=True)),
    }


# --- any settings, stopped anywhere


ANY = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A candidate is left out")
@settings(ANY, max_examples=10)
@given(runs())
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path_factory, case: dict[str, Any]) -> None:
    stop_and_resume(tmp_path_factory.mktemp("run"), case)


@pytest.mark.long  # more of the same
@pytest.mark.filterwarnings("ignore:A candidate is left out")
@settings(ANY, max_examples=40)
@given(runs())
def test_many_resumed_runs_equal_uninterrupted_ones(tmp_path_factory, case: dict[str, Any]) -> None:
    stop_and_resume(tmp_path_factory.mktemp("run"), case)


def stop_and_resume(folder: Path, case: dict[str, Any]) -> None:
    root = None if case["storage"] == "memory" else str(folder / "candidates")
    storage = StorageConfig(kind=case["storage"], dirpath=root, dtype=case["dtype"])

    def make_twa() -> TWACallback:
        return TWACallback(storage=storage, **case["twa"])

    def make_module() -> Regressor:
        return Regressor(batchnorm=case["batchnorm"])

    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(folder / name, save_top_k=-1, every_n_train_steps=1)

    whole = run(folder, make_module, make_twa, saver=saver("whole"), **case["trainer"])
    path: Path | None = None
    for i, stop in enumerate(sorted(case["stops"])):
        written = sorted((folder / ("whole" if i == 0 else "again")).glob("*=*.ckpt"), key=step_of)
        later = [p for p in written if path is None or step_of(p) > step_of(path)]
        if i + 1 < len(case["stops"]):
            later = [p for p in later if within_an_epoch(p)]
        if not later:
            break
        path = later[min(stop, len(later) - 1)]
        note(f"resumed from {path.name}")
        resumed = run(folder, make_module, make_twa, path, saver=saver("again"), **case["trainer"])
        assert differences(whole, resumed) == []


def within_an_epoch(path: Path) -> bool:
    """Not after an epoch's last batch: a run that goes on from there writes checkpoints in its
    first epoch that Lightning itself, with or without this callback, does not go on from exactly.
    """
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return not loops["epoch_loop.batch_progress"]["is_last_batch"]


def step_of(path: Path) -> int:
    return int(path.stem.split("step=")[1].split("-")[0])


# --- killed

FORK = multiprocessing.get_context("fork")


def train(root: Path, storage: str) -> None:
    """A run that checkpoints at every step and goes on from its newest checkpoint."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    twa = TWACallback(
        4,
        collect=CollectConfig(start=0, every_n_train_steps=2, max_candidates=5),
        storage=StorageConfig(
            kind=storage, dirpath=None if storage == "memory" else str(root / "candidates")
        ),
        validate_average=True,
    )
    saver = ModelCheckpoint(root / "ck", every_n_train_steps=1, save_top_k=-1)
    L.seed_everything(1, verbose=False)
    (root / "started").touch()
    the_trainer = trainer(root, callbacks=[twa, saver], enable_checkpointing=True, max_epochs=8)
    module = Regressor(batchnorm=True)
    the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=newest(root))
    torch.save([module.state_dict(), twa.averaging_weights, twa.phase], root / "end.tmp")
    (root / "end.tmp").rename(root / "end.pt")


def newest(root: Path) -> Path | None:
    """The newest checkpoint that Lightning goes on from exactly."""
    written = sorted((root / "ck").glob("*=*.ckpt"), key=step_of, reverse=True)
    return next(filter(within_an_epoch, written), None)


def written(root: Path) -> int:
    """How many checkpoints there are: one more with every step, on any computer."""
    return len(list((root / "ck").glob("*=*.ckpt")))


def start(root: Path, storage: str) -> Any:
    """Train in another process; returns when it is about to begin."""
    (root / "started").unlink(missing_ok=True)
    process = FORK.Process(target=train, args=(root, storage))
    process.start()
    while not (root / "started").exists() and process.is_alive():
        time.sleep(0.001)
    return process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.parametrize("storage", ["disk", pytest.param("memory", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path, storage) -> None:
    """Killed at 30 random moments; whenever a run gets through, the next begins."""
    whole = start(tmp_path, storage)
    whole.join(60)
    weights, beta, _ = torch.load(tmp_path / "end.pt", weights_only=True)
    killed_in = []
    moments = random.Random(storage)
    root = tmp_path / "0"
    root.mkdir()
    while len(killed_in) < 30 or not (root / "end.pt").exists():
        if (root / "end.pt").exists():
            root = tmp_path / f"{len(killed_in)}"
            root.mkdir()
        enough = written(root) + moments.randint(0, 12)
        process = start(root, storage)
        if len(killed_in) < 30:
            while written(root) < enough and process.is_alive():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.01))  # anywhere within a step
            if process.is_alive():
                process.kill()
                killed_in.append(phase_of(newest(root)))
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        if (root / "end.pt").exists():
            end = torch.load(root / "end.pt", weights_only=True)
            assert end[2] == "done"
            assert torch.equal(end[1], beta)
            assert all(torch.equal(end[0][name], weights[name]) for name in weights)
    assert set(killed_in) >= {"collect", "optimize"}, killed_in


def phase_of(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "collect"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    return state.get("TWACallback", {}).get("phase", "collect")
