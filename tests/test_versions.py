"""``make versions`` installs the bounds that ``pyproject.toml`` names."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement

from helpers.common import ROOT, load_script

versions = load_script(ROOT / ".ci" / "versions.py")

PROJECT = {
    "dependencies": ["torch>=2.4", "lightning>=2.5,<3"],
    "optional-dependencies": {
        "plot": ["matplotlib>=3.8"],
        "both": ["lightning-twa[plot]", "rich>=13"],
        "test": ["lightning-twa[both,plot]", "pytest>=8", "jsonargparse[signatures]>=4.43"],
        "docs": ["sphinx>=7"],
    },
}


def test_extras_that_an_extra_names_are_followed() -> None:
    found = versions.requirements(PROJECT)
    assert sorted(one.name for one in found) == [
        "jsonargparse",
        "lightning",
        "matplotlib",
        "pytest",
        "rich",
        "torch",
    ]


def test_a_floor_is_the_lower_bound_without_extras() -> None:
    assert versions.floor(Requirement("lightning>=2.5,<3")) == "lightning==2.5"
    assert versions.floor(Requirement("jsonargparse[signatures]>=4.43")) == "jsonargparse==4.43"


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch~=2.4"])
def test_a_requirement_without_a_floor_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line} has no lower bound in pyproject.toml"):
        versions.floor(Requirement(line))


def test_every_requirement_of_the_project_has_a_floor() -> None:
    loads = versions.tomllib.loads
    project = loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [versions.floor(one) for one in versions.requirements(project)]
    assert {"torch==2.4", "lightning==2.5", "pytest==8"} <= set(pins)
    assert len(pins) == len({pin.partition("==")[0] for pin in pins}) > 12


def test_files_that_are_left_out_are_there() -> None:
    for name in versions.LEFT_OUT:
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


def test_the_oldest_python_is_the_one_of_the_project(monkeypatch) -> None:
    declared = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert declared is not None
    monkeypatch.setattr(versions.shutil, "which", lambda name: f"/bin/{name}")
    assert versions.interpreter("lowest") == f"/bin/python{declared[1]}"
    assert versions.interpreter("highest") == sys.executable
    monkeypatch.setattr(versions.shutil, "which", lambda name: None)
    assert versions.interpreter("lowest") == sys.executable
