"""``average --method power``: an average over all steps, of any width, from one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.commands import checkpoints, failure, printed, usage
from helpers.common import Regressor, loader, trainer
from lightning_twa import CollectConfig, StorageConfig, TWACallback, average
from lightning_twa.candidates import read_file
from lightning_twa.candidates.profiles import gamma_of

WIDTHS = (0.05, 0.13, 0.2)


class Steps(Callback):
    """The weights after each optimizer step, in float64."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(
                {n: p.detach().double().clone() for n, p in pl_module.named_parameters()}
            )


def run(path: Path, **kwargs: Any) -> tuple[TWACallback, Steps]:
    """``epoch=0.ckpt`` to ``epoch=11.ckpt``: the phase begins after epoch 8, after 36 steps."""
    torch.manual_seed(0)
    twa, steps = TWACallback(9, collect=CollectConfig(power_averages=WIDTHS), **kwargs), Steps()
    saver = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    trainer(path, callbacks=[twa, steps, saver], max_epochs=12, enable_checkpointing=True).fit(
        Regressor(batchnorm=True), loader(), loader(32, seed=1)
    )
    return twa, steps


def test_it_is_near_the_average_that_is_asked_for(tmp_path, capsys) -> None:
    _, steps = run(tmp_path)
    out = tmp_path / "soup.ckpt"
    # of the width of one that is held, the fit is that one alone
    for epoch, last in ((8, 36), (9, 36), (5, 24)):  # at the switch; in the phase; before it
        text = printed(
            capsys, "average", tmp_path / f"epoch={epoch}.ckpt", "-o", out, "--force",
            *("--method", "power", "--sigma-rel", "0.13"),
        )  # fmt: skip
        assert f"wrote {out}: the power average of epoch={epoch}" in text
        assert "BatchNorm: statistics of the checkpoint's own weights, which do not fit" in text
        found = read_file(out)
        gamma = gamma_of(0.13)
        total = last ** (gamma + 1)
        shares = [(s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / total for s in range(1, last + 1)]
        for name in steps.weights[0]:
            expected = sum(b * w[name] for b, w in zip(shares, steps.weights, strict=False))
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)
    text = printed(capsys, "inspect", out)
    assert "the power average of 1 file" in text
    assert "sigma_rel: 0.13" in text
    assert "which do not fit the average (stale)" in text


def test_it_is_what_the_callback_gives(tmp_path, capsys) -> None:
    twa, _ = run(tmp_path)
    out = tmp_path / "soup.pt"
    command = ["average", tmp_path / "epoch=9.ckpt", "-o", out, "--method", "power"]
    printed(capsys, *command, "--sigma-rel", "0.16")
    expected, found = average(twa, "power", sigma_rel=0.16), read_file(out)
    for name in dict(Regressor(batchnorm=True).named_parameters()):
        torch.testing.assert_close(found[name], expected[name])
    Regressor(batchnorm=True).load_state_dict(found)


def test_what_holds_none_is_an_error_that_says_what_to_do(tmp_path, capsys) -> None:
    power = ["--method", "power", "--sigma-rel", "0.1", "-o", tmp_path / "a.pt"]
    run(tmp_path / "run")
    text = failure(capsys, "average", tmp_path / "run" / "epoch=11.ckpt", *power)
    assert "epoch=11.ckpt: it is of a finished run, which holds no running averages" in text
    several = tmp_path / "run" / "epoch=[12].ckpt"
    usage(capsys, "is of one checkpoint of a run", "average", several, *power)
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "files"))
    run(tmp_path / "disk", storage=storage)
    text = failure(capsys, "average", tmp_path / "disk" / "epoch=9.ckpt", *power)
    assert "epoch=9.ckpt: its running averages are in files of their own" in text
    checkpoints(tmp_path)
    text = failure(capsys, "average", tmp_path / "epoch=2.ckpt", *power)
    assert "epoch=2.ckpt: it holds no running averages over all steps" in text
    torch.save({"state_dict": Regressor().state_dict()}, tmp_path / "plain.ckpt")
    text = failure(capsys, "average", tmp_path / "plain.ckpt", *power)
    assert text.startswith(f"error: {tmp_path / 'plain.ckpt'} is no Lightning checkpoint")


@pytest.mark.parametrize("change", ["name", "shape"])
def test_averages_of_another_model_are_an_error(tmp_path, capsys, change) -> None:
    run(tmp_path)
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    for part in state["callbacks"]["TWACallback"]["candidates"]["power"]["averages"]:
        tensor = part.pop("net.0.bias")
        part["net.9.bias" if change == "name" else "net.0.bias"] = tensor[:3]
    torch.save(state, tmp_path / "forged.ckpt")
    text = failure(
        capsys, "average", tmp_path / "forged.ckpt", "-o", tmp_path / "a.pt",
        *("--method", "power", "--sigma-rel", "0.1"),
    )  # fmt: skip
    assert "that does not fit its state_dict" in text
