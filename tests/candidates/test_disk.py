"""Candidates in files, through the Trainer."""

from __future__ import annotations

import shutil
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Frozen, Regressor, flat, loader, trainer
from helpers.plain import CollectConfig
from helpers.resume import equal, state
from helpers.storage import files, run, saver, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import store

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.mark.parametrize("kind", [Regressor, Frozen])
def test_files_and_memory_give_the_same_run(tmp_path, kind) -> None:
    module = kind()
    memory = run(tmp_path, twa(), deepcopy(module))
    on_disk = run(tmp_path, twa(tmp_path / "c"), module)
    assert equal(memory, on_disk)
    expected = [f"version_0/epoch={e}.safetensors" for e in (1, 2, 3)]
    assert files(tmp_path / "c") == expected + ["version_0/frozen.safetensors"] * (kind is Frozen)


def test_what_is_frozen_is_written_once(tmp_path) -> None:
    from safetensors import safe_open

    module = Frozen()
    run(tmp_path, twa(tmp_path), module)
    keys = {}
    for name in ("frozen", "epoch=1", "epoch=3"):
        path = tmp_path / "version_0" / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            keys[name] = set(file.keys())
    frozen = {"parameters.net.0.weight", "parameters.net.0.bias"}
    assert keys["frozen"] == frozen
    assert keys["epoch=1"] == keys["epoch=3"]
    assert not keys["epoch=1"] & frozen
    assert "buffers.net.1.running_mean" in keys["epoch=1"]


def test_a_run_never_writes_into_the_directory_of_another(tmp_path) -> None:
    run(tmp_path, twa(tmp_path / "c"), Regressor())
    first = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*.safetensors")}
    run(tmp_path, twa(tmp_path / "c"), Regressor())
    assert {p: p.read_bytes() for p in first} == first
    assert len(files(tmp_path / "c")) == 2 * len(first)


def test_bfloat16_halves_the_files(tmp_path) -> None:
    module = Regressor()
    exact = run(tmp_path, twa(), deepcopy(module))
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        storage = StorageConfig(kind="disk", dirpath=str(tmp_path / dtype), dtype=dtype)
        rounded = run(tmp_path, twa(storage=storage), deepcopy(module))
        tensors = store.Disk(tmp_path / dtype)
        assert tensors.directory is None, "nothing is made before the first candidate"
        sizes[dtype] = (tmp_path / dtype / "version_0" / "epoch=1.safetensors").stat().st_size
    d = sum(p.numel() for p in module.parameters())
    assert sizes["float32"] - sizes["bfloat16"] == pytest.approx(2 * d, abs=16)
    difference = (flat(rounded["state"]) - flat(exact["state"])).norm()
    assert 0 < float(difference / flat(exact["state"]).norm()) < 0.01


# --- auto


def test_auto_keeps_small_candidates_of_one_process_in_memory(tmp_path) -> None:
    run(tmp_path, twa(), Regressor())
    assert files(tmp_path) == []


def test_auto_writes_files_from_a_quarter_of_the_free_memory_on(tmp_path, monkeypatch) -> None:
    module = Regressor()
    size = sum(p.nbytes for p in module.parameters())
    # After two candidates, a third would make three of twelve sizes.
    monkeypatch.setattr(store, "free_bytes", lambda device: 12 * size - 1 - 2 * size)
    the_twa = twa(collect=CollectConfig(start=0))
    memory = run(tmp_path / "m", twa(collect=CollectConfig(start=0)), deepcopy(module))
    run(tmp_path, the_twa, module)
    assert equal(state(module), memory["state"])
    assert files(tmp_path / "twa_candidates") == [
        "version_0/epoch=2.safetensors",
        "version_0/epoch=3.safetensors",
    ]


# --- the window


def test_files_out_of_the_window_are_deleted(tmp_path) -> None:
    collect = CollectConfig(start=0, max_candidates=2)
    run(tmp_path, twa(tmp_path / "c", collect=collect), Regressor())
    assert files(tmp_path / "c") == [f"version_0/epoch={e}.safetensors" for e in (2, 3)]


@pytest.mark.parametrize("kept_checkpoints", [1, -1])
def test_files_that_checkpoints_name_are_kept(tmp_path, kept_checkpoints) -> None:
    collect = CollectConfig(start=0, max_candidates=2)
    kept = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            kept.append([f[-13] for f in files(tmp_path / "c")])

    run(
        tmp_path,
        twa(tmp_path / "c", collect=collect, start_epoch=5),
        Regressor(),
        saver(tmp_path / "ck", save_top_k=kept_checkpoints),
        Look(),
        enable_checkpointing=True,
    )
    # When candidate 4 was taken, the checkpoints of epochs 2 and 3 were the newest two, of which
    # the last might have been just being written.
    if kept_checkpoints == 1:
        assert kept[-1] == ["1", "2", "3", "4"]
        return
    assert kept[-1] == ["0", "1", "2", "3", "4"]
    for epoch in (0, 1, 2, 3):
        run(
            tmp_path,
            twa(tmp_path / "c", collect=collect, start_epoch=5),
            Regressor(),
            ckpt_path=tmp_path / "ck" / f"epoch={epoch}.ckpt",
        )


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_testing_needs_no_files(tmp_path, stage) -> None:
    run(
        tmp_path,
        twa(tmp_path / "c"),
        Regressor(),
        saver(tmp_path / "ck"),
        enable_checkpointing=True,
    )
    shutil.rmtree(tmp_path / "c")
    for epoch in (2, 4, 5):
        path = tmp_path / "ck" / f"epoch={epoch}.ckpt"
        module = Regressor()
        tester = trainer(tmp_path, callbacks=[twa(tmp_path / "c")])
        getattr(tester, stage)(module, loader(), ckpt_path=path, verbose=False)
        expected = torch.load(path, weights_only=True)["state_dict"]
        assert equal(state(module), expected)


# --- resume


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kind", [Regressor, Frozen])
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch, kind) -> None:
    module = kind()
    how = {"enable_checkpointing": True}
    whole = run(tmp_path, twa(tmp_path / "c"), deepcopy(module), saver(tmp_path / "ck"), **how)
    path = tmp_path / "ck" / f"epoch={epoch}.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["TWACallback"]["candidates"]
    assert all("parameters" not in entry for entry in saved["window"])
    resumed = run(tmp_path, twa(tmp_path / "c"), kind(), ckpt_path=path)
    assert equal(whole, resumed)
    expected = [f"version_1/epoch={e}.safetensors" for e in range(epoch + 1, 4)]
    assert [f for f in files(tmp_path / "c") if f.startswith("version_1")] == expected
