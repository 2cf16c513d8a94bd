"""Files that are written while training goes on."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from helpers.common import Frozen, Regressor
from helpers.ddp import fit
from helpers.resume import equal, state
from helpers.storage import files, run, saver, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import Candidate, Store, disk, drop, find_files, name_files, pending
from lightning_twa.candidates.files import Reference, read_candidate, write_candidate

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


class Gate:
    """Lets files be written only once it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), []
        monkeypatch.setattr(disk, "write_candidate", self._write)

    def _write(self, root: Path, directory: Path, candidate: Candidate, **kwargs: Any) -> Any:
        self.begun.append(candidate.name)
        assert self.open.wait(60)
        return write_candidate(root, directory, candidate, **kwargs)

    def open_soon(self) -> None:
        threading.Timer(0.2, self.open.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def on_disk(root: Path, most: int | None = None) -> Store:
    return Store(StorageConfig(kind="disk"), most, root=root)


def moved(net: nn.Module) -> dict[str, Tensor]:
    """Fresh random weights."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_two_are_on_their_way_and_a_third_waits(tmp_path: Path, gate: Gate) -> None:
    net, store, taken = nn.Linear(3, 2), on_disk(tmp_path), []
    for name in ("epoch=0", "epoch=1"):
        taken.append(moved(net))
        store.add(net, name)
    assert files(tmp_path) == []
    assert [e.files for e in store._window] == [None, None]
    taken.append(moved(net))
    gate.open_soon()
    store.add(net, "epoch=2")
    assert gate.open.is_set(), "two may wait in memory, not three"
    store.settle()
    assert files(tmp_path) == [f"version_0/epoch={e}.safetensors" for e in range(3)]
    for candidate, weights in zip(store, taken, strict=True):
        assert equal(candidate.parameters, weights), "those of when it was taken"


def test_what_a_checkpoint_names_is_on_the_disk(tmp_path: Path, gate: Gate) -> None:
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    store.add(net, "epoch=0")
    gate.open_soon()
    named = [f["file"] for entry in store.state_dict()["window"] for f in entry["files"]]
    assert named == files(tmp_path) == ["version_0/epoch=0.safetensors"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError("no")])
def test_what_cannot_be_written_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_candidate", fails)
        weights = moved(net)
        store.add(net, "epoch=0")
        with pytest.warns(UserWarning, match=rf"'epoch=0' could not be written .*{error.args[-1]}"):
            store.state_dict()
    moved(net)
    store.add(net, "epoch=1")
    store.settle()
    first, _ = store
    assert equal(first.parameters, weights)
    assert store.nbytes == sum(p.nbytes for p in net.parameters())
    assert files(tmp_path) == ["version_0/epoch=1.safetensors"]
    assert "parameters" in store.state_dict()["window"][0]


def test_an_error_is_told_when_the_next_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        disk, "write_candidate", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    store.add(net, "epoch=0")
    store._window[0].writing._thread.join()
    with pytest.warns(UserWarning, match="'epoch=0' could not be written .*full"):
        store.add(net, "epoch=1")
    with pytest.warns(UserWarning, match="'epoch=1' could not be written .*full"):
        store.settle()


@pytest.mark.parametrize("way", ["thinned", "dropped"])
def test_a_file_of_a_candidate_that_has_left_the_window_goes(
    tmp_path: Path, gate: Gate, way: str
) -> None:
    net, store = nn.Linear(3, 2), on_disk(tmp_path, 1 if way == "thinned" else None)
    store.add(net, "epoch=0")
    store.add(net, "epoch=1")
    if way == "dropped":
        drop(store, ["epoch=0"])
    assert store.names == ["epoch=1"]
    gate.open.set()
    store.settle()
    assert files(tmp_path) == ["version_0/epoch=1.safetensors"]


def test_without_room_in_memory_a_file_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    size = sum(p.nbytes for p in net.parameters())
    monkeypatch.setattr(pending, "free_bytes", lambda device: 8 * size - 1)
    store.add(net, "epoch=0")
    assert files(tmp_path) == ["version_0/epoch=0.safetensors"]
    monkeypatch.setattr(pending, "free_bytes", lambda device: 8 * size)
    store.add(net, "epoch=1")
    assert store._window[1].writing is not None
    store.settle()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_what_is_on_its_way(tmp_path: Path, gate: Gate, copied: Any) -> None:
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    weights = moved(net)
    store.add(net, "epoch=0")
    gate.open_soon()
    again = copied(store)
    assert equal(next(iter(again)).parameters, weights)
    assert again.state_dict() == store.state_dict()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_waits_for_no_thread_that_it_does_not_have(
    tmp_path: Path, gate: Gate
) -> None:
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    weights = moved(net)
    store.add(net, "epoch=0")
    child = os.fork()
    if child == 0:
        kept = False
        try:
            with pytest.warns(UserWarning, match="'epoch=0' could not be written .*was forked"):
                store.settle()
            kept = equal(next(iter(store)).parameters, weights)
        finally:
            os._exit(0 if kept else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open.set()
    store.settle()
    assert files(tmp_path) == ["version_0/epoch=0.safetensors"]


SCRIPT = """
import os, sys, threading
from pathlib import Path
from torch import nn
from lightning_twa import StorageConfig
from lightning_twa.candidates import Store, disk

store, net = Store(StorageConfig(kind="disk"), root=Path(sys.argv[1])), nn.Linear(30, 20)
store.add(net, "epoch=0")
store.settle()
encoded, plain = threading.Event(), disk.write_candidate

def half(root, directory, candidate, **kwargs):
    (directory / f"{candidate.name}.1.tmp").write_bytes(b"half")
    encoded.set()
    threading.Event().wait()

disk.write_candidate = half
store.add(net, "epoch=1")
encoded.wait()
os._exit(9)
"""


def test_a_process_that_dies_leaves_complete_files(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=False, timeout=120)
    assert died.returncode == 9
    assert files(tmp_path) == ["version_0/epoch=0.safetensors", "version_0/epoch=1.1.tmp"]
    assert [path.stem for path in find_files(str(tmp_path / "version_0"))] == ["epoch=0"]


class Fails(Regressor):
    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.current_epoch == 3:
            raise RuntimeError("planned")
        return super().training_step(batch, index)


def test_an_exception_leaves_no_thread_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return write_candidate(*args, **kwargs)

    monkeypatch.setattr(disk, "write_candidate", slow)
    the_twa, usual, failing = twa(tmp_path / "c"), Regressor(), Fails()
    failing.load_state_dict(usual.state_dict())
    with pytest.raises(RuntimeError, match="planned"):
        run(tmp_path, the_twa, failing, saver(tmp_path / "ck"), enable_checkpointing=True)
    assert [t.name for t in threading.enumerate() if t.name == "twa-candidate"] == []
    assert files(tmp_path / "c") == [f"version_0/epoch={e}.safetensors" for e in (1, 2)]
    resumed = run(
        tmp_path, twa(tmp_path / "c"), Regressor(), ckpt_path=tmp_path / "ck" / "epoch=2.ckpt"
    )
    monkeypatch.undo()
    assert equal(resumed, run(tmp_path, twa(tmp_path / "d"), usual))


@pytest.mark.parametrize("kind", [Regressor, Frozen])
def test_a_slow_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    module = kind()
    memory = run(tmp_path, twa(), copy.deepcopy(module))

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return write_candidate(*args, **kwargs)

    monkeypatch.setattr(disk, "write_candidate", slow)
    assert equal(run(tmp_path, twa(tmp_path / "c"), module), memory)
    assert equal(state(module), memory["state"])


class Named(L.Callback):
    """Whether what a checkpoint names is on the disk when it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: Any) -> None:
        own = checkpoint["callbacks"].get("TWACallback", {})
        entries = own.get("candidates", {}).get("window", [])
        assert all((self.folder / f["file"]).exists() for e in entries for f in e["files"])
        if trainer.current_epoch == 2:
            (self.folder / f"seen{trainer.global_rank}").write_text(str(len(entries)))


@pytest.mark.slow
def test_two_processes_name_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return write_candidate(*args, **kwargs)

    monkeypatch.setattr(disk, "write_candidate", slow)
    root = tmp_path / "c"
    whole = fit(
        tmp_path,
        twa(root),
        Regressor(),
        callbacks=(Named(root), saver(tmp_path / "ck")),
        enable_checkpointing=True,
    )
    assert equal(whole[0]["state"], whole[1]["state"])
    assert [(root / f"seen{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    resumed = fit(
        tmp_path / "again", twa(root), Regressor(), ckpt_path=tmp_path / "ck" / "epoch=2.ckpt"
    )
    assert equal(resumed[0]["state"], whole[0]["state"])


def test_of_several_processes_what_was_on_its_way_stays_in_memory(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an exception, when nothing can be agreed on. The file stays for whoever needs it."""
    net, store = nn.Linear(3, 2), on_disk(tmp_path)
    weights = moved(net)
    store.add(net, "epoch=0")
    gate.open_soon()
    monkeypatch.setattr(pending, "world_size", lambda: 2)
    store.pending.leave()
    (left,) = files(tmp_path)
    size = (tmp_path / left).stat().st_size
    read = read_candidate(tmp_path, Reference("epoch=0", left, size, ""), verify=False)
    assert equal(read.parameters, weights)
    held = store.state_dict()
    assert equal(held["window"][0]["parameters"], weights)
    name_files(store, held)
    assert "files" not in held["window"][0]
    drop(store, ["epoch=0"])
    store.add(net, "epoch=0")  # that epoch again
    gate.open_soon()
    store.settle()
    assert [entry.files is None for entry in store._window] == [False]
