"""Candidates in files, through the Trainer."""

from __future__ import annotations

import errno
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Regressor, loader, trainer
from helpers.ddp import fit, flat, strided
from helpers.resume import equal, state
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_twa import CollectConfig, StorageConfig, TWACallback
from lightning_twa.candidates import CandidateFileError, disk, store

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class Frozen(Regressor):
    """Its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net[0].requires_grad_(False)


def twa(folder: Path | None = None, **kwargs: Any) -> TWACallback:
    options = {"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs}
    if folder is not None:
        options["storage"] = StorageConfig(kind="disk", dirpath=str(folder))
    return TWACallback(**options)


def run(
    folder: Path, the_twa: TWACallback, module: Regressor, *callbacks: Any, **kwargs: Any
) -> dict[str, Any]:
    """Fit in one process; the end of it."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    L.seed_everything(1, verbose=False)
    the_trainer = trainer(folder, callbacks=[the_twa, *callbacks], **kwargs)
    the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt_path)
    return {"state": state(module), "averaging_weights": the_twa.averaging_weights}


def saver(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    options = {"save_top_k": -1, "save_on_train_epoch_end": True, **kwargs}
    return ModelCheckpoint(folder, "{epoch}", **options)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


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


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("epoch", [2, 4])
def test_another_number_of_processes_goes_on(tmp_path, first, second, epoch) -> None:
    """With the same global batches, and with shards where the other had none."""
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "c"))
    module, how = Regressor(), {"use_distributed_sampler": False}
    runs = []
    for processes, path in ((first, None), (second, tmp_path / "ck" / f"epoch={epoch}.ckpt")):
        the_twa = TWACallback(
            start_epoch=4,
            collect=CollectConfig(start=1),
            storage=storage,
            distribute="auto" if path is None else "shard",
        )
        runs.append(
            fit(
                tmp_path / str(processes),
                the_twa,
                deepcopy(module),
                processes,
                callbacks=(saver(tmp_path / "ck"),) if path is None else (),
                ckpt_path=path,
                train=strided(processes),
                enable_checkpointing=path is None,
                **how,
            )
        )
    (a, *_), (b, *_) = runs
    assert b["phase"] == "done"
    torch.testing.assert_close(flat(b["state"]), flat(a["state"]), rtol=1e-5, atol=1e-6)


# --- what can go wrong


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch) -> None:
    module = Regressor()
    memory = run(tmp_path, twa(), deepcopy(module))
    plain, calls = disk.write_candidate, []

    def full(root: Path, directory: Path, candidate: Any) -> Any:
        calls.append(candidate.name)
        if candidate.name == "epoch=2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(root, directory, candidate)

    monkeypatch.setattr(disk, "write_candidate", full)
    with pytest.warns(UserWarning, match=r"Candidate 'epoch=2' could not be written to .*No space"):
        on_disk = run(tmp_path, twa(tmp_path / "c"), module)
    assert equal(memory, on_disk)
    assert calls == ["epoch=1", "epoch=2", "epoch=3"]


def test_a_directory_that_cannot_be_made_does_not_end_the_training(tmp_path) -> None:
    (tmp_path / "c").write_text("a file where the directory should be")
    module = Regressor()
    memory = run(tmp_path, twa(), deepcopy(module))
    with pytest.warns(UserWarning, match=r"'epoch=\d' could not be written .*File exists"):
        on_disk = run(tmp_path, twa(tmp_path / "c"), module)
    assert equal(memory, on_disk)


def test_a_buffer_that_no_file_can_hold_keeps_the_candidate_in_memory(tmp_path) -> None:
    module = Regressor()
    module.register_buffer("rope", torch.zeros(2, dtype=torch.complex128))
    with pytest.warns(UserWarning, match=r"could not be written to .*'buffers.rope' has dtype"):
        run(tmp_path, twa(tmp_path / "c"), module)
    assert files(tmp_path / "c") == []


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[:-4])
    elif how == "flipped bit":
        data[-3] ^= 8
        path.write_bytes(data)


DAMAGES = {"deleted": "is missing", "truncated": "truncated", "flipped bit": "is damaged"}


@pytest.mark.parametrize("how", DAMAGES)
def test_resuming_with_a_damaged_file_names_it(tmp_path, how) -> None:
    checkpoints = saver(tmp_path / "ck")
    run(tmp_path, twa(tmp_path / "c"), Regressor(), checkpoints, enable_checkpointing=True)
    damage(tmp_path / "c" / "version_0" / "epoch=2.safetensors", how)
    before = files(tmp_path / "c")
    with pytest.raises(CandidateFileError, match=rf"epoch=2\.safetensors .*{DAMAGES[how]}"):
        run(tmp_path, twa(tmp_path / "c"), Regressor(), ckpt_path=tmp_path / "ck/epoch=3.ckpt")
    assert files(tmp_path / "c") == before


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_damaged_while_collecting_is_left_out_with_a_warning(tmp_path, how) -> None:
    class Damage(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                damage(tmp_path / "c" / "version_0" / "epoch=1.safetensors", how)

    the_twa = twa(tmp_path / "c")
    match = rf"A candidate is left out: .*epoch=1\.safetensors .*{DAMAGES[how]}"
    with pytest.warns(UserWarning, match=match):
        run(tmp_path, the_twa, Regressor(), Damage())
    assert the_twa.phase == "done"
    assert the_twa.candidate_names == ["epoch=2", "epoch=3"]


def test_a_checkpoint_with_files_needs_them(tmp_path) -> None:
    how = {"enable_checkpointing": True}
    run(tmp_path, twa(tmp_path / "c"), Regressor(), saver(tmp_path / "ck"), **how)
    memory = twa(storage=StorageConfig(kind="memory"))
    with pytest.raises(ValueError, match=r"candidates are in files \(version_0/epoch=1\.safe"):
        run(tmp_path, memory, Regressor(), ckpt_path=tmp_path / "ck" / "epoch=2.ckpt")


def test_a_hostile_checkpoint_reads_and_deletes_nothing_outside(tmp_path) -> None:
    how = {"enable_checkpointing": True}
    run(tmp_path, twa(tmp_path / "c"), Regressor(), saver(tmp_path / "ck"), **how)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((tmp_path / "c" / "version_0" / "epoch=1.safetensors").read_bytes())
    for target in ("../outside.safetensors", str(outside)):
        checkpoint = torch.load(tmp_path / "ck" / "epoch=2.ckpt", weights_only=True)
        window = checkpoint["callbacks"]["TWACallback"]["candidates"]["window"]
        window[0]["files"][0]["file"] = target
        torch.save(checkpoint, tmp_path / "hostile.ckpt")
        collect = CollectConfig(start=1, max_candidates=2)  # which would drop, and delete, it
        with pytest.raises(CandidateFileError, match="outside"):
            run(
                tmp_path,
                twa(tmp_path / "c", collect=collect),
                Regressor(),
                ckpt_path=tmp_path / "hostile.ckpt",
            )
        assert outside.exists()


# --- several processes


@pytest.mark.slow
def test_processes_of_a_host_share_one_copy(tmp_path) -> None:
    class Writers(L.Callback):
        """How many processes have written, and whether their tensors lie in the file's pages."""

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                maps = Path("/proc/self/maps").read_text()
                torch.save(
                    (the_twa._run.store.disk._writes, "epoch=2.safetensors" in maps),
                    tmp_path / f"writer{trainer.global_rank}.pt",
                )

    the_twa = TWACallback(start_epoch=4, collect=CollectConfig(start=1))
    fit(tmp_path / "run", the_twa, Regressor(), callbacks=(Writers(),))
    found = [torch.load(tmp_path / f"writer{rank}.pt", weights_only=True) for rank in range(2)]
    assert found == [(True, True), (False, True)]
    assert files(tmp_path / "run" / "twa_candidates") == [
        f"version_0/epoch={e}.safetensors" for e in (1, 2, 3)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Candidate 'epoch=2' could not be written")
def test_when_one_process_cannot_write_all_keep_the_candidate_in_memory(
    tmp_path, monkeypatch
) -> None:
    plain = disk.write_candidate

    def full(root: Path, directory: Path, candidate: Any) -> Any:
        if candidate.name == "epoch=2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(root, directory, candidate)

    module = Regressor()
    whole = fit(tmp_path / "whole", twa(tmp_path / "c"), deepcopy(module))
    monkeypatch.setattr(disk, "write_candidate", full)
    full_disk = fit(tmp_path / "full", twa(tmp_path / "d"), module)
    assert equal(whole[0], full_disk[0])
    assert equal(full_disk[0], full_disk[1])
    assert "version_0/epoch=2.safetensors" not in files(tmp_path / "d")


@pytest.mark.slow
def test_a_host_that_does_not_see_the_files_has_a_writer_of_its_own(tmp_path, monkeypatch) -> None:
    """Two processes that pretend to be two hosts with a disk each."""
    monkeypatch.setattr(disk, "_host", lambda: f"host {torch.distributed.get_rank()}")
    plain = disk.Disk.__init__

    def own_disk(self: Any, root: Path, **kwargs: Any) -> None:
        mine = root / f"disk {torch.distributed.get_rank()}"
        plain(self, mine, **kwargs)

    monkeypatch.setattr(disk.Disk, "__init__", own_disk)
    module = Regressor(batchnorm=True)
    two = fit(tmp_path / "run", twa(tmp_path / "c"), module)
    assert equal(two[0]["state"], two[1]["state"])
    first, second = tmp_path / "c" / "disk 0", tmp_path / "c" / "disk 1"
    assert files(first) == files(second) != []
    for name in files(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), "one digest for all"


@pytest.mark.slow
def test_nan_weights_on_one_process_end_all_of_them(tmp_path) -> None:
    class Bad(Regressor):
        def on_train_epoch_end(self) -> None:
            if self.trainer.current_epoch == 1 and self.trainer.global_rank == 1:
                nn.init.constant_(self.net[0].bias, torch.nan)

    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"Candidate 'epoch=\d', .*NaN"
    ):
        fit(tmp_path, twa(tmp_path / "c"), Bad())
