"""What each file of the mathematics may import: a floor uses only the floors below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lightning_twa import subspace

ROOM = Path(subspace.__file__).parent
PACKAGE = "lightning_twa.subspace"
FLOORS = [  # from the bottom
    "tensors",
    "directions.scratch",
    "directions.codec",
    "layout",
    "directions.tiles",
    "directions.chunks",
    "directions.kernels",
    "directions.rows",
    "directions.padding",
    "directions.interface",
    "directions.dense",
    "directions.packed",
    "directions",
    "columns",
    "subspace",
    "bases",
    "candidate_tiles",
    "device_tiles",
    "passes",
    "build",
    "training.checks",
    "training.schedules",
    "training.inverse_root",
    "training.solvers",
    "training.parametrizations",
    "training.exchange",
    "training.saved",
    "training.optimizer",
    "training",
    "",
]
BESIDE = ("config", "machine")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOM).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in ROOM.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {n for n in names if n.removeprefix(f"{PACKAGE}.") in FILES}
            found.update(modules or {node.module or ""})
    return {name for name in found if name.startswith("lightning")}


def test_every_file_has_its_floor() -> None:
    assert sorted(FILES) == sorted(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_a_file_imports_only_what_lies_below_it(name) -> None:
    below = FLOORS[: FLOORS.index(name)]
    for module in imported(FILES[name]):
        if module.startswith(f"{PACKAGE}."):
            other = module.removeprefix(f"{PACKAGE}.")
            assert other in below, f"{name} imports {other}, which does not lie below it"
            room = other.partition(".")[0]
            assert "." not in other or name.startswith(room), f"{name} reaches into {room}"
        else:
            allowed = tuple(f"lightning_twa.{folder}" for folder in BESIDE)
            assert module.startswith(allowed), f"{name} imports {module}"


@pytest.mark.parametrize("name", ["", "directions", "training"])
def test_a_room_says_what_belongs_there_and_what_others_may_use(name) -> None:
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    assert any(
        isinstance(node, ast.Assign) and node.targets[0].id == "__all__" for node in tree.body
    )
