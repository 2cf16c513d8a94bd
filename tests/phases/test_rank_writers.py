"""What one process cannot write is told to all of them, and none waits for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from helpers.common import Regressor
from helpers.ddp import fit
from helpers.plain import CollectConfig
from helpers.resume import equal, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import disk, files, store
from lightning_twa.machine import rank
from lightning_twa.phases import collect, finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
]

ERRORS = [RuntimeError, MemoryError, OSError, KeyError]


def on_one_rank(
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    failing: int,
    at: int = 1,
    error: type[Exception] = RuntimeError,
) -> None:
    """Let a call of a function fail in one process."""
    original, calls = getattr(target, name), [0]

    def act(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if rank() == failing and calls[0] == at:
            raise error("planned, here")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, act)


class FailsToSave(Regressor):
    """One rank's own hook raises where the average is written."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.failing = failing

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.global_rank == self.failing and self.trainer.current_epoch >= 5:
            raise RuntimeError("planned, here")


@pytest.mark.filterwarnings("ignore:Candidate .* could not be written")
@pytest.mark.parametrize(
    ("target", "name", "failing", "at", "error"),
    [
        (disk, "write_candidate", 0, 2, RuntimeError),
        *(
            pytest.param(*way, marks=pytest.mark.long)
            for way in [
                (disk, "write_candidate", 0, 1, MemoryError),
                (disk, "make_directory", 0, 1, KeyError),
                (disk, "read_candidate", 0, 2, MemoryError),
                (disk, "read_candidate", 1, 1, RuntimeError),
                (files, "encode", 0, 2, RuntimeError),
            ]
        ),
    ],
)
def test_what_one_rank_cannot_write_stays_in_the_memory_of_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    failing: int,
    at: int,
    error: type[Exception],
) -> None:
    on_one_rank(monkeypatch, target, name, failing, at, error)
    two = fit(tmp_path, twa(storage=StorageConfig(kind="disk")), Regressor())
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(two[0]["state"], two[1]["state"])
    assert two[0]["candidate_names"] == two[1]["candidate_names"]
    usual = fit(tmp_path / "usual", twa(), Regressor())
    assert equal(two[0]["state"], usual[0]["state"])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_copy_that_fails_on_one_rank_is_one_error_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    on_one_rank(monkeypatch, store, "Taking", failing, 2)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="planned, here"):
        fit(tmp_path, twa(storage=StorageConfig(kind="memory")), Regressor())


def _in_hook(monkeypatch: pytest.MonkeyPatch, failing: int) -> L.LightningModule:
    return FailsToSave(failing)


def _in_strategy(monkeypatch: pytest.MonkeyPatch, failing: int) -> L.LightningModule:
    on_one_rank(monkeypatch, DDPStrategy, "save_checkpoint", failing, error=OSError)
    return Regressor()


def _in_replacing(monkeypatch: pytest.MonkeyPatch, failing: int) -> L.LightningModule:
    on_one_rank(monkeypatch, os, "replace", failing, error=OSError)
    return Regressor()


def _in_making(monkeypatch: pytest.MonkeyPatch, failing: int) -> L.LightningModule:
    make = Path.mkdir

    def act(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "there" and rank() == failing:
            raise OSError("planned, here")
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", act)
    return Regressor()


@pytest.mark.filterwarnings("ignore:The average could not be written")
@pytest.mark.parametrize(
    ("where", "failing"),
    [
        (_in_hook, 1),
        (_in_strategy, 0),
        *(
            pytest.param(where, failing, marks=pytest.mark.long)
            for where, failing in [
                (_in_hook, 0),
                (_in_strategy, 1),
                (_in_replacing, 0),
                (_in_making, 0),
            ]
        ),
    ],
)
def test_when_one_rank_cannot_write_the_average_all_go_on_without_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, failing: int
) -> None:
    module = where(monkeypatch, failing)
    callback = twa(save_average=tmp_path / "there" / "average.ckpt")
    two = fit(tmp_path, callback, module)
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(two[0]["state"], two[1]["state"])
    assert not list(tmp_path.rglob("*.ckpt"))


class StopsLate(L.Callback):
    """Ends the run behind the last checkpoint."""

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 4


@pytest.mark.filterwarnings("ignore:The checkpoint .* could not be written again")
@pytest.mark.parametrize("failing", [None, 0, *(pytest.param(1, marks=pytest.mark.long),)], ids=str)
def test_when_the_last_checkpoint_cannot_be_written_again_it_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int | None
) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_last=True, every_n_train_steps=1)
    if failing is not None:
        write = finished.write_checkpoint

        def act(trainer: L.Trainer, temporary: Path, *args: Any, **kwargs: Any) -> Any:
            with monkeypatch.context() as patch:
                if "last" in temporary.name:
                    on_one_rank(patch, DDPStrategy, "save_checkpoint", failing, error=OSError)
                return write(trainer, temporary, *args, **kwargs)

        monkeypatch.setattr(finished, "write_checkpoint", act)
    two = fit(
        tmp_path,
        twa(),
        Regressor(batchnorm=True),
        callbacks=[saver, StopsLate()],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(two[0]["state"], two[1]["state"])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 20
    assert equal(dict(last["state_dict"]), two[0]["state"]) is (failing is None)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("name", "caller"), [("find_files", "resolve"), ("read_candidate_from", "catch_up")]
)
def test_a_file_that_one_rank_cannot_read_is_an_error_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, caller: str
) -> None:
    for i in range(2):
        torch.save(Regressor().state_dict(), tmp_path / f"{i}.pt")
    on_one_rank(monkeypatch, collect, name, failing=1, error=ValueError)
    original = getattr(collect.Collector, caller)

    def note(*args: Any) -> None:
        try:
            original(*args)
        except ValueError as error:
            (tmp_path / f"rank{rank()}.txt").write_text(str(error))
            for _ in range(100):  # the first that dies has the others killed
                if (tmp_path / f"rank{1 - rank()}.txt").is_file():
                    break
                time.sleep(0.05)
            raise

    monkeypatch.setattr(collect.Collector, caller, note)
    callback = twa(start_epoch=0, collect=CollectConfig(checkpoints=str(tmp_path / "*.pt")))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="planned, here"):
        fit(tmp_path, callback, Regressor())
    for i in range(2):
        assert (tmp_path / f"rank{i}.txt").read_text() == "ValueError: planned, here"
