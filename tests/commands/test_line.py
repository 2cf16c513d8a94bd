"""The command line: its help, its usage errors, and that it runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from helpers.commands import usage
from helpers.common import ROOT
from lightning_twa.__main__ import main


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
        ("--method power and --sigma-rel go together", ["-o", "a.pt", "--method", "power"]),
        ("must be between 0 and 1", ["-o", "a.pt", "--method", "power", "--sigma-rel", "2"]),
    ],
)
def test_wrong_usage(tmp_path, capsys, monkeypatch, message, options) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "w.pt")
    usage(capsys, message, "average", "w.pt", *options)
    usage(capsys, "arguments are required: command")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


def test_help_names_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    helped = capsys.readouterr().out
    assert helped.startswith("usage: python -m lightning_twa")
    assert "inspect" in helped


def test_the_version_and_the_script(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lightning-twa {version('lightning-twa')}\n"
    scripts = re.findall(r"(?m)^\[project\.scripts\]\n(.*)$", (ROOT / "pyproject.toml").read_text())
    name, _, target = scripts[0].partition(" = ")
    assert name == "lightning-twa"
    module, _, function = target.strip('"').partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_its_name_is_that_of_the_script(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lightning-twa"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: lightning-twa [-h] [--version]")


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lightning_twa", "inspect", "none.ckpt"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: none.ckpt does not exist")
