"""What holds for the package as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_twa

LOADED = """
import sys, lightning
packages = lambda: {name.split(".")[0] for name in sys.modules}
before = packages()
import lightning_twa
print(sorted(packages() - before))
print("pytorch_lightning" in sys.modules)
"""


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """What one process printed for all: importing torch and Lightning takes seconds."""
    command = [sys.executable, "-c", LOADED]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_import_pulls_in_nothing_beyond_lightning_and_safetensors(loaded: list[str]) -> None:
    extra = set(eval(loaded[0]))
    assert "lightning_twa" in extra
    assert extra <= {"lightning_twa", "safetensors"}, f"import lightning_twa also imports {extra}"


def test_the_other_package_is_imported_only_where_it_is_asked_for(loaded: list[str]) -> None:
    assert loaded[1] == "False"


def test_public_names_exist() -> None:
    for name in lightning_twa.__all__:
        assert getattr(lightning_twa, name).__doc__


def test_mathematics_imports_no_lightning_and_only_config_from_the_package() -> None:
    package = Path(lightning_twa.__file__).parent
    allowed = ("lightning_twa.subspace", "lightning_twa.config", "lightning_twa.machine")
    for path in (package / "subspace").rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import lightning", "from lightning")):
                assert line.split()[1].startswith(allowed), f"{path.name}: {line}"
