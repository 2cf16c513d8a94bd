"""A disk that fails, and files that are damaged, through the Trainer."""

from __future__ import annotations

import errno
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor
from helpers.plain import CollectConfig
from helpers.resume import equal
from helpers.storage import files, run, saver, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import CandidateFileError, disk

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch) -> None:
    module = Regressor()
    memory = run(tmp_path, twa(), deepcopy(module))
    plain, calls = disk.write_candidate, []

    def full(root: Path, directory: Path, candidate: Any, **kwargs: Any) -> Any:
        calls.append(candidate.name)
        if candidate.name == "epoch=2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(root, directory, candidate, **kwargs)

    monkeypatch.setattr(disk, "write_candidate", full)
    with pytest.warns(UserWarning, match=r"Candidate 'epoch=2' could not be written to .*No space"):
        on_disk = run(tmp_path, twa(tmp_path / "c"), module)
    assert equal(memory, on_disk)
    assert calls == ["epoch=1", "epoch=2", "epoch=3"]


def test_a_directory_that_cannot_be_made_does_not_end_the_training(tmp_path) -> None:
    """Known in setup it is refused; see test_room.py."""

    class Later(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            (tmp_path / "c").write_text("a file where the directory should be")

    module = Regressor()
    memory = run(tmp_path, twa(), deepcopy(module))
    with pytest.warns(UserWarning, match=r"'epoch=\d' could not be written .*File exists"):
        on_disk = run(tmp_path, twa(tmp_path / "c"), module, Later())
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
                the_twa._run.store.settle()  # a thread may not be done with it
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


def test_a_file_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch) -> None:
    """On Windows it is mapped; elsewhere permissions may have changed."""

    def refuses(root: Path, reference: Any) -> None:
        raise PermissionError(errno.EACCES, "it is being used", reference.file)

    monkeypatch.setattr(disk, "delete_candidate", refuses)
    module = Regressor()
    memory = run(tmp_path, twa(collect=CollectConfig(start=0, max_candidates=2)), deepcopy(module))
    callback = twa(tmp_path / "c", collect=CollectConfig(start=0, max_candidates=2))
    with pytest.warns(UserWarning, match=r"c is not needed .*could not be deleted .*used"):
        on_disk = run(tmp_path, callback, module)
    assert equal(memory, on_disk)
    assert "version_0/epoch=0.safetensors" in files(tmp_path / "c")


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_three_cycles_with_running_averages_and_a_checkpoint_to_keep(tmp_path, kind) -> None:
    """Candidates of the cycles have the same names, and entries hold tensors."""
    callback = twa(
        tmp_path / "c" if kind == "disk" else None,
        start_epoch=2,
        cycles=3,
        collect=CollectConfig(start=0, ema_decays=(0.9,)),
    )
    best = ModelCheckpoint(tmp_path / "k", monitor="val_loss", save_top_k=-1)
    run(tmp_path, callback, Regressor(), best, max_epochs=12, enable_checkpointing=True)
    assert callback.candidate_names == ["ema(0.9)", "epoch=8", "epoch=9"]
    if kind == "disk":
        written = [name for name in files(tmp_path / "c") if "ema" in name]
        parts = ("", "part_1/", "part_2/")
        assert written == [f"version_0/{part}ema(0.9).safetensors" for part in parts]
