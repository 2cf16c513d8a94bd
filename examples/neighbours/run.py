"""Short runs with the callback in other projects that train with Lightning: ``make neighbours``.

Each project gets an environment of its own with its newest release, torch first, and then runs
``fit_<project>.py`` of this folder, which compares the model at the end with the sum of candidates
that its averaging weights say. Needs a package index; environments that are there are used again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# What pip installs, by the name of the script.
PROJECTS = {
    "chemprop": "chemprop",
    "darts": "u8darts[torch]",
    "finetuning_scheduler": "finetuning-scheduler",
    "pytorch_forecasting": "pytorch-forecasting",
    "scvi_tools": "scvi-tools",
}


def pip(python: Path, *arguments: str) -> None:
    """Install into an environment, with the torch of ``constraints.txt``."""
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *constraints, *arguments], check=True
    )


def install(name: str, folder: Path) -> Path:
    """The environment of a project.

    Returns:
        Its Python.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(python, "torch")
    pip(python, PROJECTS[name])
    pip(python, "--editable", str(ROOT))
    return python


def main() -> int:
    """Install and run; 1 when a project's run failed, which is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the environments go")
    parser.add_argument("projects", nargs="*", choices=[*PROJECTS, []], help="all, if not given")
    args = parser.parse_args()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    failed = []
    for name in args.projects or PROJECTS:
        python = install(name, args.folder.resolve() / name)
        script = HERE / f"fit_{name}.py"
        if subprocess.run([str(python), str(script)], env=clean).returncode:
            failed.append(name)
    print(
        f"failed: {', '.join(failed)}" if failed else "all models are the sums that they should be"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
