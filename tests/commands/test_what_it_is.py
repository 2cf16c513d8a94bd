"""What ``inspect`` says a file is, what ``plot`` draws of it, and files that are something else."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

import lightning_twa
from helpers.commands import checkpoints, failure, printed
from helpers.common import Regressor, loader, trainer
from helpers.figures import compared
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SolverConfig
from lightning_twa.candidates import read_file


def test_which_weights_a_checkpoint_holds(tmp_path, capsys) -> None:
    checkpoints(tmp_path, validate_average=True)
    for epoch, held in (
        (1, "those of ordinary training; nothing is averaged yet"),
        (3, "the uniform average of the candidates so far, which was validated"),
        (4, "the average after optimizer step 4 of the phase; it goes on"),
        (5, "the finished average, learned in the phase"),
    ):
        text = printed(capsys, "inspect", tmp_path / f"epoch={epoch}.ckpt")
        step = 4 * epoch + 4
        assert text.startswith(
            f"{tmp_path / f'epoch={epoch}.ckpt'} is a checkpoint of a run with TWACallback, in "
            f"epoch {epoch}, after optimizer step {step}\nweights: {held}\nphase: "
        )


@pytest.mark.parametrize("uniform", [False, True])
def test_whose_batchnorm_statistics_it_holds(tmp_path, capsys, uniform) -> None:
    solver = SolverConfig(name="uniform") if uniform else None
    twa = TWACallback(4, collect=CollectConfig(start=1), solver=solver)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(batchnorm=True), loader()
    )
    raw = "BatchNorm: statistics of ordinary training, of these weights\n"
    fitted = "BatchNorm: statistics re-estimated over 4 training batches"
    assert raw in printed(capsys, "inspect", tmp_path / "epoch=3.ckpt")
    learning = printed(capsys, "inspect", tmp_path / "epoch=4.ckpt")
    behind = f"{fitted} at optimizer step 16, 4 steps before these weights\n"
    assert (raw if uniform else behind) in learning
    assert f"{fitted}, for these weights\n" in printed(capsys, "inspect", tmp_path / "epoch=5.ckpt")
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    entry = state["callbacks"]["TWACallback"]
    for batchnorm, text in (
        ({"batches": None, "step": 24}, "not re-estimated for the average (stale)"),
        (None, "not known whether the statistics are of these weights"),  # of an earlier version
    ):
        entry.pop("batchnorm", None)
        entry.update({} if batchnorm is None else {"batchnorm": batchnorm})
        torch.save(state, tmp_path / "other.ckpt")
        assert text in printed(capsys, "inspect", tmp_path / "other.ckpt")


def test_a_fixed_average_that_held_out_data_chose(tmp_path, capsys) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    twa = lightning_twa.TWACallback(4, collect=lightning_twa.CollectConfig(exclude="net.2"))
    the_trainer = trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    early = printed(capsys, "inspect", tmp_path / "epoch=0.ckpt")
    assert "exclude: net.2\n" in early
    assert "candidates: 0, and 5 running averages to come; 5 in the checkpoint" in early
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    state["callbacks"]["TWACallback"]["result"].update(accepted=None, start="power(0.13)")
    torch.save(state, tmp_path / "fixed.ckpt")
    text = printed(capsys, "inspect", tmp_path / "fixed.ckpt")
    assert "the finished average, fixed: 'power(0.13)', chosen by held-out data\n" in text
    assert "loss on the validation data" in text
    result = state["callbacks"]["TWACallback"]["result"]
    for change, entry in (({"uniform": [1.0]}, "averages.uniform"), (3, "averages")):
        state["callbacks"]["TWACallback"]["result"] = {**result, "averages": change}
        torch.save(state, tmp_path / "forged.ckpt")
        assert f"{entry} is" in failure(capsys, "inspect", tmp_path / "forged.ckpt")
    del result["averages"]  # of an earlier version
    state["callbacks"]["TWACallback"]["result"] = result
    torch.save(state, tmp_path / "earlier.ckpt")
    assert (
        text.splitlines()[1:]
        == printed(capsys, "inspect", tmp_path / "earlier.ckpt").splitlines()[1:]
    )


def test_candidates_that_do_not_count_are_one_line(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    entry = state["callbacks"]["TWACallback"]
    for weights, expected in (
        ([0.0, 1.0, 0.0], ["epoch=2 +1.0000", "weight 0: the other 2, epoch=1 .. epoch=3"]),
        ([0.0, 0.4, 0.6], ["epoch=1 +0.0000", "epoch=2 +0.4000", "epoch=3 +0.6000"]),
    ):
        entry["averaging_weights"] = torch.tensor(weights, dtype=torch.float64)[:, None]
        torch.save(state, tmp_path / "other.ckpt")
        lines = printed(capsys, "inspect", tmp_path / "other.ckpt").splitlines()
        at = lines.index("averaging weights")
        assert [" ".join(line.split()) for line in lines[at + 2 :]] == expected


@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors"])
def test_an_average_of_files_says_of_what(tmp_path, capsys, kind) -> None:
    checkpoints(tmp_path)
    out = tmp_path / f"soup.{kind}"
    files = tmp_path / "epoch=[0-2].ckpt"
    filtered = ["--filter", "net.0", "*.bias", "--exclude", "net.0.bias"]
    ema = ["--method", "ema", "--decay", "0.5"]
    printed(capsys, "average", files, "-o", out, *ema, *filtered)
    text = printed(capsys, "inspect", out)
    what = {"ckpt": "Lightning checkpoint", "pt": "state dict", "safetensors": "safetensors file"}
    assert text.splitlines() == [
        f"{out} is a {what[kind]} with",
        f"the exponential moving average of 3 files, written by lightning-twa "
        f"{lightning_twa.__version__}; coefficients were not trained",
        "tensors: 4, 65 numbers",
        "decay: 0.5",
        "include: ['net.0', '*.bias']",
        "exclude: ['net.0.bias']",
        "BatchNorm: none",
        "  epoch=0  +0.1429",
        "  epoch=1  +0.2857",
        "  epoch=2  +0.5714",
    ]
    newest = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    found = read_file(out)
    same = {name for name, tensor in newest.items() if torch.equal(tensor, found[name])}
    assert same == {"net.0.bias", "net.2.weight"}
    Regressor().load_state_dict(found)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": [3]},
        {"weights": [float("nan")] * 3},
        {"weights": [1.0]},
        {"batchnorm": 3},
        {"method": None},
        {"options": []},
    ],
)
def test_what_others_have_written_is_not_believed(tmp_path, capsys, change) -> None:
    checkpoints(tmp_path)
    printed(capsys, "average", tmp_path / "epoch=[0-2].ckpt", "-o", tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state["lightning_twa"].update(change)
    torch.save(state, tmp_path / "b.ckpt")
    assert "is no Lightning checkpoint" in failure(capsys, "inspect", tmp_path / "b.ckpt")


def test_plot_writes_the_figures(tmp_path, capsys) -> None:
    checkpoints(tmp_path)
    text = printed(capsys, "plot", tmp_path / "epoch=5.ckpt")
    out = tmp_path / "epoch=5-weights.png"
    wrote, table, path, others = text.splitlines()[-4:]
    assert wrote == f"wrote {out}"
    assert out.read_bytes()[:4] == b"\x89PNG"
    why = "There are no losses on held-out data to draw (the run had no such data, or no phase)."
    assert table.startswith(f"not drawn: epoch=5-heldout.png. {why}")
    assert path.startswith(f"not drawn: epoch=5-loss-path.png. {why}")
    assert others.startswith("not drawn: the path over the plane of the candidates, and the loss")
    (tmp_path / "figures").mkdir()
    printed(capsys, "plot", tmp_path / "epoch=5.ckpt", "-o", tmp_path / "figures", "--format=svg")
    assert "<svg" in (tmp_path / "figures" / "epoch=5-weights.svg").read_text()
    text = failure(capsys, "plot", tmp_path / "epoch=2.ckpt")
    assert "was written before the phase began: there are no averaging weights to draw" in text
    text = failure(capsys, "plot", tmp_path / "epoch=5.ckpt", "-o", tmp_path / "none")
    assert "none is no directory. Make it first" in text


def test_plot_writes_what_held_out_data_have_shown(tmp_path, capsys) -> None:
    compared(tmp_path)
    lines = printed(capsys, "plot", tmp_path / "epoch=5.ckpt").splitlines()
    files = [tmp_path / f"epoch=5-{name}.png" for name in ("weights", "heldout", "loss-path")]
    assert lines[-4:-1] == [f"wrote {file}" for file in files]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
    lines = printed(capsys, "plot", tmp_path / "epoch=4.ckpt").splitlines()  # in the phase
    assert lines[-4] == f"wrote {tmp_path / 'epoch=4-weights.png'}"
    assert "(the phase has not ended yet)" in lines[-3]
    save_file({"w": torch.ones(3)}, tmp_path / "average.safetensors")
    text = failure(capsys, "plot", tmp_path / "average.safetensors")
    assert "average.safetensors holds weights alone" in text


FOREIGN = {
    "text": b"hello world\n" * 20,
    "empty": b"",
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04K\x01.",
    "half": None,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_and_broken_files_are_one_line(tmp_path, capsys, content) -> None:
    if content is None:
        module = Regressor()
        torch.save({"state_dict": module.state_dict()}, tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()[:700]
    for suffix in ("ckpt", "pt", "pth", "bin", "safetensors"):
        file = tmp_path / f"file.{suffix}"
        file.write_bytes(content)
        for command in (["inspect", file], ["plot", file], ["average", file, "-o", "out.pt"]):
            text = failure(capsys, *command)
            assert text.startswith(f"error: {file}")
            assert text.count("\n") == 1
    text = failure(capsys, "inspect", tmp_path)  # a directory of nothing but such files
    assert "file.safetensors is no safetensors file that can be read" in text
    assert text.count("\n") == 1
    (tmp_path / "file.safetensors").unlink()
    text = failure(capsys, "inspect", tmp_path)
    assert "Name them by a pattern" in text
    assert text.count("\n") == 1
