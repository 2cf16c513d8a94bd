"""``python -m lightning_twa`` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Regressor, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_twa import CollectConfig, StorageConfig, SubspaceConfig, TWACallback, average
from lightning_twa.__main__ import main


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
    assert "candidates: 2, " in collecting
    assert collecting.splitlines()[-2:] == ["  epoch=1", "  epoch=2"]
    where = "MiB in the checkpoint" if kind == "memory" else "2 files in version_0 of the storage"
    assert where in collecting

    optimizing = printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    assert "phase: optimize" in optimizing
    assert "phase began: epoch 4, optimizer step 16" in optimizing
    assert "basis: pca" in optimizing
    state = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)["callbacks"]["TWACallback"]
    for name, weight in zip(twa.candidate_names, state["averaging_weights"][:, 0], strict=True):
        assert f"{name}     {weight:+.4f}" in optimizing

    done = printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
    assert "phase: done" in done
    assert "candidates: 3, no longer needed" in done
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
    for file, message in (
        (plain, "holds nothing of a TWACallback"),
        (tmp_path / "epoch=0.ckpt", "before the first candidate was kept"),
        (broken, "is damaged"),
        (tmp_path, "is a directory"),
        (tmp_path / "none.ckpt", "does not exist"),
        (tmp_path / "weights.pt", "is no Lightning checkpoint"),
    ):
        text = failure(capsys, "inspect", file)
        assert text.startswith("error: "), file
        assert message in text
        assert "Traceback" not in text
    text = failure(capsys, "inspect", tmp_path / "epoch=2.ckpt", "--plot", tmp_path / "x.png")
    assert "There are no averaging weights before the phase begins" in text


def test_inspect_opens_no_other_file(tmp_path, capsys) -> None:
    checkpoints(tmp_path, storage=StorageConfig(kind="disk"))
    state = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    secret = tmp_path.parent / "secret.safetensors"
    secret.write_text("secret")
    for entry in state["callbacks"]["TWACallback"]["candidates"]["window"]:
        entry["files"][0]["file"] = "../../secret.safetensors"
    torch.save(state, tmp_path / "hostile.ckpt")
    text = printed(capsys, "inspect", tmp_path / "hostile.ckpt")
    assert "2 files in ../.. of the storage directory" in text
    assert secret.read_text() == "secret"


def test_average_writes_every_format(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    pattern = str(tmp_path / "epoch=[123].ckpt")
    expected = average(pattern)
    for name in ("soup.safetensors", "soup.pt", "soup.ckpt"):
        text = printed(capsys, "average", pattern, "-o", tmp_path / name)
        assert text == f"wrote {tmp_path / name}: the average of 3 files\n"
    found = {
        "safetensors": load_file(tmp_path / "soup.safetensors"),
        "pt": torch.load(tmp_path / "soup.pt", weights_only=True),
        "ckpt": Regressor.load_from_checkpoint(tmp_path / "soup.ckpt").state_dict(),
    }
    for state in found.values():
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)
    checkpoint = torch.load(tmp_path / "soup.ckpt", weights_only=True)
    assert not {"callbacks", "optimizer_states", "loops"} & set(checkpoint)
    the_trainer = trainer(tmp_path)
    results = the_trainer.test(
        Regressor(), loader(), ckpt_path=tmp_path / "soup.ckpt", verbose=False
    )
    assert set(results[0]) == {"test_loss"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_average_passes_its_options_on(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    files = [tmp_path / f"epoch={i}.ckpt" for i in (1, 2, 3)]
    out = tmp_path / "out.pt"
    for options, arguments in (
        (["--last", "2"], {"last": 2}),
        (["--method", "ema", "--decay", "0.5"], {"method": "ema", "decay": 0.5}),
        (
            ["--method", "weights", "--weights", "0.5", "-0.5", "1"],
            {"method": "weights", "weights": [0.5, -0.5, 1.0]},
        ),
    ):
        printed(capsys, "average", *files, "-o", out, "--force", *options)
        expected, found = average(files, **arguments), torch.load(out, weights_only=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_average_says_what_is_wrong(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    file, out = tmp_path / "epoch=1.ckpt", tmp_path / "out.pt"
    out.write_text("mine")
    assert "exists. Use --force" in failure(capsys, "average", file, "-o", out)
    assert out.read_text() == "mine"
    assert "must end in one of" in failure(capsys, "average", file, "-o", tmp_path / "out.zip")
    text = failure(capsys, "average", tmp_path / "no*.ckpt", "-o", tmp_path / "a.pt")
    assert "matches no file" in text
    printed(capsys, "average", file, "-o", tmp_path / "state.pt")
    text = failure(capsys, "average", tmp_path / "state.pt", "-o", tmp_path / "a.ckpt")
    assert "is no Lightning checkpoint, so the average cannot be one" in text
    assert not (tmp_path / "a.ckpt").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(SystemExit) as usage:
        main(["average", str(file)])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


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
