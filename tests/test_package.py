"""What holds for the package as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning_twa

LOADED = "import sys; import {module}; print(sorted(m.split('.')[0] for m in sys.modules))"


def loaded(module: str) -> set[str]:
    code = LOADED.format(module=module)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(eval(out.stdout))


def test_import_pulls_in_nothing_beyond_lightning_and_safetensors() -> None:
    extra = loaded("lightning_twa") - loaded("lightning")
    assert extra <= {"lightning_twa", "safetensors"}, f"import lightning_twa also imports {extra}"


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
