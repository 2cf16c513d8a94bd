"""``python -m lightning_twa inspect``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

import lightning_twa
from helpers.commands import checkpoints, failure, printed, usage
from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig
from lightning_twa.candidates.reference import Reference, resolve
from lightning_twa.commands import inspect


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_inspect_in_every_phase(tmp_path, capsys, kind) -> None:
    twa = checkpoints(tmp_path, storage=StorageConfig(kind=kind))
    collecting = printed(capsys, "inspect", tmp_path / "epoch=2.ckpt")
    assert "phase: collect" in collecting
    assert collecting.splitlines()[-2:] == ["  epoch=1", "  epoch=2"]
    where = "candidates: 2; 2 in the checkpoint (0.0 MiB)\n"
    if kind == "disk":
        root = tmp_path / "twa_candidates"
        where = f"candidates: 2; 2 files (0.0 MiB)\n  storage directory: {root}, all there\n"
    assert where in collecting

    optimizing = printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    assert "phase: optimize" in optimizing
    assert "phase began: epoch 4, optimizer step 16" in optimizing
    assert "optimizer steps of the phase: 4" in optimizing
    assert "basis: pca" in optimizing
    assert "rank" not in optimizing  # what is not set
    state = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)["callbacks"]["TWACallback"]
    for name, weight in zip(twa.candidate_names, state["averaging_weights"][:, 0], strict=True):
        assert f"{name}     {weight:+.4f}" in optimizing

    done = printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
    assert "phase: done" in done
    assert "candidates: 3; not in the checkpoint, the phase is finished" in done
    for name, weight in zip(twa.candidate_names, twa.averaging_weights[:, 0], strict=True):
        assert f"{name}     {weight:+.4f}" in done


def test_many_blocks_are_summed_up(tmp_path, capsys) -> None:
    twa = checkpoints(tmp_path, subspace=SubspaceConfig(blocks=1))
    text = printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
    assert "net.0.weight" in text  # four blocks: a column each
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    weights = torch.randn(3, 9).double()
    entry = state["callbacks"]["TWACallback"]
    entry.update(averaging_weights=weights, block_names=[f"b{i}" for i in range(9)])
    torch.save(state, tmp_path / "many.ckpt")
    text = printed(capsys, "inspect", tmp_path / "many.ckpt")
    assert "averaging weights over 9 blocks" in text
    row = weights[0]
    assert f"{row.mean():+.4f}   {row.min():+.4f}   {row.max():+.4f}" in text
    assert twa.num_candidates == 3


def test_inspect_draws(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    out = tmp_path / "weights.png"
    text = printed(capsys, "inspect", tmp_path / "epoch=5.ckpt", "--plot", out)
    assert f"wrote {out}" in text
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_inspect_says_what_is_wrong(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    plain = tmp_path / "plain.ckpt"
    the_trainer = trainer(tmp_path, max_epochs=1)
    the_trainer.fit(Regressor(), loader())
    the_trainer.save_checkpoint(plain)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((tmp_path / "epoch=5.ckpt").read_bytes()[:1000])
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    for file, message in (
        (plain, "holds nothing of a TWACallback"),
        (tmp_path / "epoch=0.ckpt", "before the first candidate was kept"),
        (broken, "is damaged"),
        (tmp_path, "holds no candidates"),
        (sharded, "is a directory, as of a sharded checkpoint"),
        (tmp_path / "none.ckpt", "does not exist"),
        (tmp_path / "weights.pt", "is no Lightning checkpoint"),
    ):
        text = failure(capsys, "inspect", file)
        assert text.startswith("error: "), file
        assert message in text
        assert "Traceback" not in text
    text = failure(capsys, "inspect", tmp_path / "epoch=2.ckpt", "--plot", tmp_path / "x.png")
    assert "There are no averaging weights before the phase begins" in text
    nowhere = tmp_path / "none" / "x.png"
    message = "x.png' does not exist; make it"
    usage(capsys, message, "inspect", tmp_path / "epoch=5.ckpt", "--plot", nowhere)


def forged(tmp_path: Path, epoch: int, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint of a run with candidates in files whose state somebody has changed."""
    if not (tmp_path / "epoch=5.ckpt").exists():
        checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
    change(state["callbacks"]["TWACallback"])
    torch.save(state, tmp_path / "forged.ckpt")
    return tmp_path / "forged.ckpt"


def test_inspect_says_which_files_are_missing(tmp_path, capsys) -> None:
    checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    root = tmp_path / "twa_candidates"
    checkpoint = tmp_path / "epoch=4.ckpt"
    size = (root / "version_0" / "epoch=2.safetensors").stat().st_size
    (root / "version_0" / "epoch=1.safetensors").unlink()
    (root / "version_0" / "epoch=2.safetensors").write_bytes(b"short")
    text = printed(capsys, "inspect", checkpoint)
    assert f"  storage directory: {root}\n" in text
    assert "  version_0/epoch=1.safetensors: missing\n" in text
    assert f"  version_0/epoch=2.safetensors: damaged, 5 bytes instead of {size}\n" in text
    assert "epoch=3.safetensors" not in text

    # anywhere else it must be named
    elsewhere = tmp_path / "a" / "b" / "c" / "d" / "e" / "f"
    elsewhere.mkdir(parents=True)
    moved = checkpoint.rename(elsewhere / "epoch=4.ckpt")
    text = printed(capsys, "inspect", moved)
    assert "files in version_0 of a storage directory that was not found" in text
    text = printed(capsys, "inspect", moved, "--candidates", root)
    assert f"  storage directory: {root}\n  version_0/epoch=1.safetensors: missing\n" in text
    text = failure(capsys, "inspect", moved, "--candidates", tmp_path / "none")
    assert "is no directory" in text


def test_inspect_finds_the_files_from_where_lightning_puts_checkpoints(tmp_path, capsys) -> None:
    checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    moved = (tmp_path / "epoch=4.ckpt").rename(folder / "last.ckpt")
    assert f"{tmp_path / 'twa_candidates'}, all there" in printed(capsys, "inspect", moved)


@pytest.mark.parametrize(
    "file", ["../../secret.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\\..\\x.safetensors"]
)
def test_inspect_follows_no_path_out_of_the_directory(tmp_path, capsys, monkeypatch, file) -> None:
    def change(state: dict[str, Any]) -> None:
        state["candidates"]["window"][0]["files"][0]["file"] = file

    hostile = forged(tmp_path, 2, change)
    followed: list[str] = []

    def record(root: Path, reference: Reference) -> Path:
        followed.append(reference.file)
        return resolve(root, reference)

    monkeypatch.setattr(inspect, "resolve", record)
    text = printed(capsys, "inspect", hostile)
    assert f"  outside of the storage directory, not looked for: {file}\n" in text
    assert "all there" not in text
    assert set(followed) == {"version_0/epoch=2.safetensors"}


def test_a_uniform_run_had_no_phase(tmp_path, capsys) -> None:
    twa = TWACallback(2, solver=SolverConfig(name="uniform"))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(Regressor(), loader())
    text = printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
    assert "averaged: epoch 5, optimizer step 24\n" in text
    assert "phase began" not in text


def test_inspect_opens_no_candidate_and_follows_no_link(tmp_path, capsys) -> None:
    checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    folder = tmp_path / "twa_candidates" / "version_0"
    for file in folder.glob("*.safetensors"):  # of the same size, but not to be read
        file.write_bytes(bytes(file.stat().st_size))
    assert "all there" in printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    secret = (folder / "epoch=1.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "epoch=1.safetensors").symlink_to(secret)
    text = printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    assert "epoch=1.safetensors: leads out of the storage directory by a link" in text
    assert secret.read_bytes() == bytes(secret.stat().st_size)


FORGED = [
    (2, lambda s: s["candidates"]["window"][0].update(files=["x"])),
    (2, lambda s: s["candidates"]["window"][0].update(files=[{"name": "a", "size": 1}])),
    (5, lambda s: s.update(averaging_weights=torch.ones(2, 1).double())),
    (5, lambda s: s.update(averaging_weights=torch.ones(3, 1).double().to_sparse())),
    (5, lambda s: s.update(block_names=["a", "b"])),
    (5, lambda s: s.update(candidate_names=[], averaging_weights=torch.ones(0, 1).double())),
]


@pytest.mark.parametrize(("epoch", "change"), FORGED)
def test_inspect_of_entries_that_do_not_fit_together(tmp_path, capsys, epoch, change) -> None:
    text = failure(capsys, "inspect", forged(tmp_path, epoch, change))
    assert "forged.ckpt: The TWACallback state in the checkpoint is damaged, or another" in text


def test_names_cannot_steer_the_terminal(tmp_path, capsys) -> None:
    name = "\x1b[2Jred\nphase: done"

    def change(state: dict[str, Any]) -> None:
        state["candidate_names"][0] = state["candidates"]["window"][0]["name"] = name

    for epoch in (2, 4):
        text = printed(capsys, "inspect", forged(tmp_path, epoch, change))
        assert "\x1b" not in text
        assert "\\x1b[2Jred\\nphase: done" in text
        assert "phase: done" not in text.splitlines()
    text = failure(capsys, "inspect", "\x1b[2J.ckpt")
    assert text.startswith("error: \\x1b[2J.ckpt does not exist")


def test_running_averages_are_counted(tmp_path, capsys) -> None:
    twa = TWACallback(4, collect=CollectConfig(start=1, ema_decays=(0.5, 0.9)))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(Regressor(), loader())
    text = printed(capsys, "inspect", tmp_path / "epoch=3.ckpt")
    to_come = "candidates: 3, and 2 running averages to come; 5 in the checkpoint (0.0 MiB, 2 of"
    assert f"{to_come} them running averages)" in text
    text = printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    assert "candidates: 5; " in text


def test_inspect_files_of_candidates(tmp_path, capsys) -> None:
    checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    folder = tmp_path / "twa_candidates" / "version_0"
    text = printed(capsys, "inspect", folder / "epoch=2.safetensors")
    numbers = sum(p.numel() for p in Regressor().parameters())
    assert text.splitlines()[:2] == [
        "candidate: epoch=2",
        f"tensors: 4, {numbers} numbers, float32",
    ]
    (folder / "epoch=2.safetensors").write_bytes(b"broken")
    text = printed(capsys, "inspect", folder)
    assert text.startswith(f"candidates: 2 files (0.0 MiB) in {folder}\n  epoch=1: 4 tensors, ")
    assert f"{folder / 'epoch=2.safetensors'} is no safetensors file that can be read" in text
    assert "  epoch=3: " in text
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    text = failure(capsys, "inspect", tmp_path / "other.safetensors")
    assert "other.safetensors is no candidate of a run" in text
    text = failure(capsys, "inspect", tmp_path / "twa_candidates")
    assert "of 1 run(s), one directory each" in text
    usage(capsys, "--plot needs a checkpoint", "inspect", folder, "--plot", tmp_path / "x.png")


def test_the_state_of_a_derived_callback_is_found(tmp_path, capsys) -> None:
    class Mine(lightning_twa.TWACallback):
        pass

    twa = Mine(4, collect=CollectConfig(start=1), heldout=None)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    keys = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["callbacks"]
    assert not any(key.startswith("TWACallback") for key in keys)
    assert "phase: done" in printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
