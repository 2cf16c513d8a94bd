"""``average`` with a model: BatchNorm statistics of the average, and the greedy soup."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.swa_utils import update_bn

from helpers.commands import failure, printed, usage
from helpers.common import load_script, trainer
from lightning_twa import average
from lightning_twa.commands.model import _class

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of it

FILE = """
import lightning as L
import torch
from torch import nn
from helpers.common import Regressor, loader


class Data(L.LightningDataModule):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self):
        return loader(self.size)

    def val_dataloader(self):
        return loader(32, seed=1)


class Model(Regressor):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        norm = nn.BatchNorm1d(width)
        self.net = nn.Sequential(nn.Linear(6, width), norm, nn.Tanh(), nn.Linear(width, 1))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_x", -self.net[0].weight.norm())


class Other(Model):
    def __init__(self, width: int = 3) -> None:
        super().__init__(width)
        self.extra = nn.Linear(1, 1)


class Broken(Model):
    def training_step(self, batch, batch_idx):
        raise KeyError("no such column")
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checkpoints of a run of a user's classes, in the working directory."""
    name = f"user_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    script = load_script(tmp_path / f"{name}.py")
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(0)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_epochs=3).fit(
        script.Model(5), script.Data()
    )
    script.name = name
    return script


def reference(user: Any, batches: int | None = None) -> dict[str, torch.Tensor]:
    """The average, with statistics by torch's own pass, in float64."""
    module = user.Model(5).double()
    module.load_state_dict(average("epoch=*.ckpt"))
    data = [x.double() for x, _ in user.Data().train_dataloader()]
    module.forward = module.net.forward
    update_bn(data[:batches], module)
    return module.state_dict()


@pytest.mark.matrix(3)
@pytest.mark.parametrize("batches", [None, 2])
@pytest.mark.parametrize("how", ["classes", "configuration", "sections"])
def test_statistics_are_those_of_the_average(user, tmp_path, capsys, how, batches) -> None:
    if how == "sections":  # of a LightningCLI whose classes are fixed: the file has arguments alone
        (tmp_path / "config.yaml").write_text("model:\n  width: 5\ndata:\n  size: 64\n")
    else:
        text = "seed_everything: true\nckpt_path: null\ntrainer:\n  accelerator: cpu\n"
        for section, name, own in (("model", "Model", "width: 5"), ("data", "Data", "size: 64")):
            text += f"{section}:\n  class_path: {user.name}.{name}\n  init_args:\n    {own}\n"
        (tmp_path / "config.yaml").write_text(text)
    classes = ["--module", f"{user.name}.Model", "--data", f"{user.name}.Data"]
    options = {
        "classes": classes,  # and the hyper-parameters of the checkpoint
        "configuration": ["--config", "config.yaml"],
        "sections": ["--config", "config.yaml", *classes],
    }[how]
    some = [] if batches is None else ["--batches", batches]
    text = printed(capsys, "average", "epoch=*.ckpt", "-o", "soup.ckpt", *options, *some)
    over = "statistics re-estimated for the average over "
    assert f"BatchNorm: {over}{batches or 4} training batches\n" in text
    found = torch.load("soup.ckpt", weights_only=True)["state_dict"]
    expected = reference(user, batches)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)
    assert found["net.1.num_batches_tracked"].dtype == torch.long
    assert f"BatchNorm: {over}" in printed(capsys, "inspect", "soup.ckpt")


def test_without_a_model_it_says_that_they_are_stale(user, capsys) -> None:
    text = printed(capsys, "average", "epoch=*.ckpt", "-o", "soup.pt")
    stale = "BatchNorm: averaged with the weights, and do not fit the average (stale)\n"
    assert stale in text
    assert "pass --config config.yaml of LightningCLI, or --module and --data" in text
    assert stale in printed(capsys, "inspect", "soup.pt")
    text = printed(capsys, "average", "epoch=2.ckpt", "-o", "one.pt")
    assert "stale" not in text
    assert "statistics of the file, which fit it" in printed(capsys, "inspect", "one.pt")


def test_the_greedy_soup_of_a_monitor(user, capsys) -> None:
    classes = ["--module", f"{user.name}.Model", "--data", f"{user.name}.Data"]
    greedy = ["average", "epoch=*.ckpt", "-o", "soup.pt", *classes, "--method", "greedy", "--force"]
    module, data = user.Model(5), user.Data()
    for name, options in (("val_loss", {}), ("val_x", {"mode": "max"}), ("val_x", {"mode": "min"})):
        extra = [f"--mode={options['mode']}"] if options else []
        text = printed(capsys, *greedy, "--monitor", name, *extra)
        assert "wrote soup.pt: the greedy soup out of 3 files, epoch=0 .. epoch=2" in text
        assert "the greedy soup out of 3 files, written by" in printed(capsys, "inspect", "soup.pt")
        how = {"module": module, "trainer": trainer(Path()), "dataloaders": data, **options}
        expected = average("epoch=*.ckpt", "greedy", monitor=name, **how)
        found = torch.load("soup.pt", weights_only=True)
        assert torch.equal(found["net.0.weight"], expected["net.0.weight"])
    assert "mode is missing: the name of monitor='val_x'" in failure(
        capsys, *greedy, "--monitor", "val_x"
    )
    usage(capsys, "--method greedy and --monitor go together", *greedy)
    text = failure(capsys, *[a for a in greedy if "ata" not in a], "--monitor", "val_loss")
    assert "Model has no val_dataloader. Pass --data" in text
    usage(
        capsys,
        "--method greedy needs the model: --config or --module",
        *["average", "epoch=*.ckpt", "-o", "s.pt", "--method", "greedy", "--monitor", "val_loss"],
    )


def test_what_a_model_cannot_be_made_of(user, tmp_path, capsys) -> None:
    (tmp_path / "text.yaml").write_text("a: [")
    (tmp_path / "other.yaml").write_text("optimizer: 3\n")
    (tmp_path / "arguments.yaml").write_text("model:\n  height: 5\n")
    name = user.name
    for options, message in (
        (["--module", "nowhere.Model"], "--module nowhere.Model cannot be imported"),
        (["--module", f"{name}.Nothing"], "cannot be imported"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--config", "text.yaml"], "text.yaml is no YAML"),
        (["--config", "other.yaml"], "has no section 'model' or 'data'"),
        (["--config", "arguments.yaml"], "does not name the class of the model"),
        (["--config", "arguments.yaml", "--module", f"{name}.Model"], "could not be made"),
        (["--module", f"{name}.Broken", "--data", f"{name}.Data"], "KeyError: 'no such column'"),
        (["--module", f"{name}.Other"], "'extra.weight' is in one of them only"),
        (["--module", f"{name}.Model"], "could not be re-estimated"),  # without data
    ):
        text = failure(capsys, "average", "epoch=*.ckpt", "-o", "out.pt", *options)
        assert text.startswith("error: "), options
        assert message in text, options
        assert text.count("\n") == 1, options
        assert not (tmp_path / "out.pt").exists()


def test_a_module_that_changes_the_directory_when_it_is_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moves.py").write_text("import os\nos.chdir('elsewhere')\n\nclass Own:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert _class("moves.Own", "module").__name__ == "Own"
    assert sys.path == before
