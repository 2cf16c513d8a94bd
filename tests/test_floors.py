"""The one way down through the rooms is held by a linter, which notices what leads past it."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.common import ROOT
from lightning_twa.candidates import Store
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.collect import Collector
from lightning_twa.phases.optimize import Optimization
from lightning_twa.phases.run import Run
from lightning_twa.phases.start import Switch
from lightning_twa.phases.transitions import Stage
from lightning_twa.trainer import TrainerSwitch

PLANTED = {
    "nothing": (None, "", None),
    "up": ("candidates/store.py", "from lightning_twa.phases import Run", "One way down"),
    "beside": ("figures/canvas.py", "from lightning_twa.average import average", "One way down"),
    "within": (
        "subspace/tensors.py",
        "from lightning_twa.subspace import build",
        "from the tensors",
    ),
    "circle": ("phases/plan.py", "from lightning_twa.phases import run", "in circles"),
    "past": (
        "average/fixed.py",
        "from lightning_twa.candidates.store import Store",
        "past the door of",
    ),
    "whole": ("words.py", "import lightning_twa", "imports the whole package"),
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("what", PLANTED)
def test_the_linter_holds_and_notices_what_is_planted(tmp_path: Path, what: str) -> None:
    pytest.importorskip("importlinter")
    file, line, contract = PLANTED[what]
    shutil.copytree(ROOT / "lightning_twa", tmp_path / "lightning_twa")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        path = tmp_path / "lightning_twa" / file
        path.write_text(f"{path.read_text()}\n{line}\n")
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode == 0) == (contract is None), found.stdout + found.stderr
    broken = [text for text in found.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(contract in text for text in broken) if contract else not broken


def test_classes_that_call_each_other_share_no_name_of_a_method() -> None:
    """A call then says where it goes. ``state_dict`` is torch's own convention."""
    chain = (Run, Stage, Averaging, Collector, Optimization, Switch, TrainerSwitch, Store)
    methods = {
        kind: {name for name, value in vars(kind).items() if inspect.isfunction(value)}
        for kind in chain
    }
    for one, other in itertools.combinations(chain, 2):
        shared = {name for name in methods[one] & methods[other] if not name.startswith("__")}
        assert shared <= {"state_dict", "load_state_dict"}, (one, other)


def test_the_documentation_has_every_arrow_between_rooms() -> None:
    page = (ROOT / "docs" / "contributing" / "rooms.md").read_text()
    table = page.split("| room | uses |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    package, used = ROOT / "lightning_twa", {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        others = set(re.findall(r"^from lightning_twa\.(\w+)", path.read_text(), re.MULTILINE))
        used[room] = used.get(room, set()) | (others - {room})
    assert {room.strip("`"): set(uses.split(", ")) for room, uses in rows} == {
        room: others for room, others in used.items() if others
    }
