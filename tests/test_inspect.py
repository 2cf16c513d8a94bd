"""``python -m lightning_twa`` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import Regressor, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    StorageConfig,
    SubspaceConfig,
    TWACallback,
    average,
    inspecting,
)
from lightning_twa.__main__ import main
from lightning_twa.candidates.reference import Reference, resolve


def checkpoints(tmp_path: Path, **kwargs: Any) -> TWACallback:
    """``epoch=0.ckpt`` to ``epoch=5.ckpt``: the phase begins after epoch 3."""
    twa = TWACallback(4, collect=CollectConfig(start=1), **kwargs)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(0)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    return twa


def printed(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    assert main([str(a) for a in arguments]) == 1
    return capsys.readouterr().err


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

    monkeypatch.setattr(inspecting, "resolve", record)
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
    assert "candidates: 3; 5 in the checkpoint (0.0 MiB, 2 of them running averages)" in text
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
    assert text.startswith(f"candidates: 3 files (0.0 MiB) in {folder}\n  epoch=1: 4 tensors, ")
    assert f"{folder / 'epoch=2.safetensors'} is no safetensors file that can be read" in text
    assert "  epoch=3: " in text
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    text = failure(capsys, "inspect", tmp_path / "other.safetensors")
    assert "other.safetensors is no candidate of a run" in text
    text = failure(capsys, "inspect", tmp_path / "twa_candidates")
    assert "of 1 run(s), one directory each" in text
    usage(capsys, "--plot needs a checkpoint", "inspect", folder, "--plot", tmp_path / "x.png")


def test_average_writes_every_format(tmp_path, capsys) -> None:
    checkpoints(tmp_path, validate_average=True)
    pattern = str(tmp_path / "epoch=[123].ckpt")
    expected = average(pattern)
    for name in ("soup.safetensors", "soup.pt", "soup.ckpt"):
        text = printed(capsys, "average", pattern, "-o", tmp_path / name)
        what = "the uniform average of 3 files, epoch=1 .. epoch=3"
        assert text == f"wrote {tmp_path / name}: {what}\n"
    modes = {(tmp_path / f"soup.{kind}").stat().st_mode for kind in ("pt", "ckpt", "safetensors")}
    assert modes == {(tmp_path / "epoch=1.ckpt").stat().st_mode}
    found = {
        "safetensors": load_file(tmp_path / "soup.safetensors"),
        "pt": torch.load(tmp_path / "soup.pt", weights_only=True),
        "ckpt": Regressor.load_from_checkpoint(tmp_path / "soup.ckpt").state_dict(),
    }
    for state in found.values():
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)
    checkpoint = torch.load(tmp_path / "soup.ckpt", weights_only=True)
    assert "current_model_state" in torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    stale = {"callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state"}
    assert not stale & set(checkpoint)
    the_trainer = trainer(tmp_path)
    results = the_trainer.test(
        Regressor(), loader(), ckpt_path=tmp_path / "soup.ckpt", verbose=False
    )
    assert set(results[0]) == {"test_loss"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_extra_state_of_modules_stays(tmp_path, capsys) -> None:
    class Extra(Regressor):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.version = state["version"]

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_epochs=2).fit(
        Extra(), loader()
    )
    printed(capsys, "average", tmp_path / "*.ckpt", "-o", tmp_path / "soup.ckpt")
    assert Extra.load_from_checkpoint(tmp_path / "soup.ckpt").version == 3


def test_average_passes_its_options_on(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    files = [tmp_path / f"epoch={i}.ckpt" for i in (1, 2, 3)]
    out = tmp_path / "out.pt"
    weighted = {"method": "weights", "weights": [0.5, -0.5, 1.0]}
    tiny = {"method": "weights", "weights": [-1e-3, 1.0]}
    for options, arguments, used in (
        (["--last", "2"], {}, files[1:]),
        (["--last", "9"], {}, files),
        (["--method", "ema", "--decay", "0.5"], {"method": "ema", "decay": 0.5}, files),
        (["--method", "weights", "--weights", "0.5", "-0.5", "1"], weighted, files),
        (["--method", "weights", "--weights", "0.5,-0.5", "1"], weighted, files),
        (["--last", "2", "--method", "weights", "--weights=-1e-3,1"], tiny, files[1:]),
    ):
        printed(capsys, "average", *files, "-o", out, "--force", *options)
        expected, found = average(used, **arguments), torch.load(out, weights_only=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def usage(capsys: pytest.CaptureFixture, message: str, *arguments: Any) -> None:
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_average_says_what_is_wrong(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    file, out = tmp_path / "epoch=1.ckpt", tmp_path / "out.pt"
    out.write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    for output, message in (
        (out, "exists. Use --force"),
        (tmp_path / "none" / "out.pt", "is no directory. Make it first"),
        (tmp_path / "folder.pt", "is a directory. Give the name of a file"),
    ):
        assert message in failure(capsys, "average", file, "-o", output)
    assert "is a directory" in failure(
        capsys, "average", file, "-o", tmp_path / "folder.pt", "--force"
    )
    assert out.read_text() == "mine"
    text = failure(capsys, "average", tmp_path / "no*.ckpt", "-o", tmp_path / "a.pt")
    assert "matches no file" in text
    printed(capsys, "average", file, "-o", tmp_path / "state.pt")
    text = failure(capsys, "average", tmp_path / "state.pt", "-o", tmp_path / "a.ckpt")
    assert "is no Lightning checkpoint, so the average cannot be one" in text
    assert not (tmp_path / "a.ckpt").exists()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("must end in one of", ["-o", "out.zip"]),
        ("required: -o/--output", []),
        ("--method ema and --decay go together", ["-o", "a.pt", "--method", "ema"]),
        ("--method ema and --decay go together", ["-o", "a.pt", "--decay", "0.5"]),
        ("must be between 0 and 1", ["-o", "a.pt", "--method", "ema", "--decay", "1"]),
        ("--method weights and --weights go together", ["-o", "a.pt", "--weights", "1"]),
        ("must be a finite number", ["-o", "a.pt", "--method", "weights", "--weights", "nan"]),
        ("must be a finite number", ["-o", "a.pt", "--method", "weights", "--weights", "1,x"]),
        ("2 numbers, but 1 file", ["-o", "a.pt", "--method", "weights", "--weights", "1,2"]),
        ("must be an integer, 1 or more", ["-o", "a.pt", "--last", "0"]),
        ("invalid choice: 'greedy'", ["-o", "a.pt", "--method", "greedy"]),
    ],
)
def test_wrong_usage(tmp_path, capsys, monkeypatch, message, options) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "w.pt")
    usage(capsys, message, "average", "w.pt", *options)
    usage(capsys, "arguments are required: command")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "safetensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path, capsys, suffix) -> None:
    resource = pytest.importorskip("resource")
    checkpoints(tmp_path)
    out = tmp_path / f"soup.{suffix}"
    out.write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # writes fail beyond these bytes
    try:
        status = main(["average", str(tmp_path / "epoch=1.ckpt"), "-o", str(out), "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert "error: " in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert not list(tmp_path.glob(".*.tmp"))


def test_it_runs_as_a_module(tmp_path) -> None:
    command = [sys.executable, "-m", "lightning_twa"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("usage: python -m lightning_twa")
    assert "inspect" in helped.stdout
    failed = subprocess.run(
        [*command, "inspect", "none.ckpt"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: none.ckpt does not exist")


def test_the_state_of_a_derived_callback_is_found(tmp_path, capsys) -> None:
    class Mine(TWACallback):
        pass

    twa = Mine(4, collect=CollectConfig(start=1))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    keys = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["callbacks"]
    assert not any(key.startswith("TWACallback") for key in keys)
    assert "phase: done" in printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
