"""The callback in LightningCLI: options, files, help, saved configurations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import load_script, weights
from lightning_twa import CollectConfig, SolverConfig, SubspaceConfig, TWACallback

FOLDER = Path(__file__).parents[1] / "examples" / "cli"
QUICK = (
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=2",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning's use of jsonargparse
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(scope="module")
def example() -> Any:
    return load_script(FOLDER / "main.py")


def callback_of(cli: Any) -> TWACallback:
    (twa,) = [c for c in cli.trainer.callbacks if isinstance(c, TWACallback)]
    return twa


@pytest.mark.parametrize("name", ["lightning_twa.TWACallback", "TWACallback"])
def test_options_of_the_command_line(example, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    cli = example.main(
        [
            "fit",
            *QUICK,
            "--trainer.max_epochs=6",
            f"--trainer.callbacks+={name}",
            "--trainer.callbacks.start_epoch=4",
            "--trainer.callbacks.collect.start=1",
            "--trainer.callbacks.collect.ema_decays=[0.9,0.99]",
            "--trainer.callbacks.subspace.bits=4",
            "--trainer.callbacks.subspace.blocks=tensor",
            "--trainer.callbacks.solver.radius=1.5",
            "--trainer.callbacks.storage.kind=memory",
        ]
    )
    twa = callback_of(cli)
    assert twa.settings.start_epoch == 4
    assert twa.settings.collect == CollectConfig(start=1, ema_decays=(0.9, 0.99))
    assert twa.settings.subspace == SubspaceConfig(bits=4, blocks="tensor")
    assert twa.settings.solver == SolverConfig(radius=1.5)
    assert twa.settings.storage.kind == "memory"
    assert twa.phase == "done"
    power = [*(f"power({width})" for width in (0.02, 0.056, 0.13, 0.23)), "mean"]
    snapshots = ["epoch=1", "epoch=2", "epoch=3"]
    assert twa.candidate_names == ["ema(0.9)", "ema(0.99)", *power, *snapshots]


@pytest.mark.parametrize(("file", "average"), [("twa.yaml", "learned"), ("swa.yaml", "uniform")])
def test_the_files_of_the_example(example, tmp_path, monkeypatch, file, average) -> None:
    monkeypatch.chdir(tmp_path)
    cli = example.main(["fit", "--config", str(FOLDER / file), *QUICK[1:]])
    twa = callback_of(cli)
    assert twa.phase == "done"
    n = twa.num_candidates
    assert n == (6 if average == "uniform" else 11)
    uniform = torch.full((n, 1), 1 / n, dtype=torch.float64)
    assert torch.equal(twa.averaging_weights, uniform) == (average == "uniform")


def test_a_saved_configuration_gives_the_same_run(example, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*QUICK, "--trainer.max_epochs=6", "--trainer.callbacks+=TWACallback"]
    options += ["--trainer.callbacks.start_epoch=0.6", "--trainer.callbacks.subspace.blocks=100"]
    first = example.main(["fit", *options])
    saved = tmp_path / "config.yaml"
    text = Path(first.trainer.log_dir or tmp_path, "config.yaml").read_text()
    saved.unlink(missing_ok=True)
    saved.write_text(text)
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.chdir(again)
    second = example.main(["fit", "--config", str(saved)])
    assert callback_of(second).settings == callback_of(first).settings
    assert torch.equal(weights(second.model), weights(first.model))


@pytest.mark.parametrize(
    ("part", "name", "meaning"),
    [
        (None, "start_epoch", "First epoch (0-based) of the phase"),
        (None, "cycles", "Divide the run into so many parts"),
        ("subspace", "subspace.bits", "How an entry of a direction is kept"),
        ("subspace", "subspace.group_size", "With more candidates than this"),
        ("solver", "solver.radius", "Step budget"),
        ("collect", "collect.ema_decays", "Decays of exponential moving averages"),
        ("storage", "storage.kind", "in main memory"),
    ],
)
def test_help_shows_what_each_argument_means(example, capsys, part, name, meaning) -> None:
    more = [] if part is None else [f"--trainer.callbacks.{part}.help"]
    with pytest.raises(SystemExit) as stop:
        example.main(["fit", "--trainer.callbacks.help=TWACallback", *more])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"--trainer.callbacks.{name}" in text
    assert meaning in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("subspace.bits=11", "Invalid SubspaceConfig.bits=11. Must be 1 to 8, 16 or 32."),
        ("solver.name=lbfgs", "Expected a"),
        ("data=test", "Expected a"),
        ("start_epok=3", "start_epok"),
        ("start_epoch=1.5", "Invalid start_epoch=1.5."),
    ],
)
def test_wrong_options_are_named(example, capsys, option, message) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        example.main(
            ["fit", "--trainer.callbacks+=TWACallback", f"--trainer.callbacks.{option}", *QUICK]
        )
    text = capsys.readouterr().err + str(stop.value)
    assert message in text
    assert option.split("=")[1] in text


def test_it_runs_as_a_command(tmp_path) -> None:
    options = ["--trainer.max_epochs=4", "--trainer.callbacks+=lightning_twa.TWACallback"]
    options += ["--trainer.callbacks.start_epoch=3", *QUICK]
    result = subprocess.run(
        [sys.executable, str(FOLDER / "main.py"), "fit", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "TWA: phase finished after 4 optimizer steps" in result.stdout + result.stderr


def test_a_whole_number_is_an_epoch_even_as_a_float() -> None:
    assert CollectConfig(start=4.0) == CollectConfig(start=4)
    assert isinstance(CollectConfig(start=4.0).start, int)
    assert TWACallback(4.0).settings.start_epoch == 4
    assert isinstance(TWACallback(4.0).settings.start_epoch, int)
