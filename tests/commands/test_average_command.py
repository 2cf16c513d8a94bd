"""``python -m lightning_twa average``."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from helpers.commands import checkpoints, failure, printed
from helpers.common import Regressor, loader, trainer
from lightning_twa import average
from lightning_twa.__main__ import main


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
