"""The quick tests with the lowest, or the newest, torch and Lightning: ``make versions``.

``lowest`` installs what ``pyproject.toml`` names as the lower bound of each dependency, those of
the tests too; ``highest`` the newest that its upper bounds allow. Each has an environment of its
own, in which nothing is upgraded that is there: delete it to begin anew. Linters, documentation and
scripts of examples are left out: they do not depend on these versions, or take long.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NAME = "lightning-twa"
EXTRA = "test"
LEFT_OUT = (
    "claims",
    "cifar",
    "cifar_parts",
    "docs",
    "examples",
    "floors",
    "house",
    "release_check",
)
SHOWN = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "safetensors", "numpy")
# Of a library that is older than what it imports: pyparsing under matplotlib 3.8, setuptools under
# torchmetrics 1.1. Those of new libraries are errors, as everywhere.
OLD_LIBRARIES = ("-W", "ignore::DeprecationWarning")


def requirements(project: dict[str, object], extra: str = EXTRA) -> list[Requirement]:
    """Of the package and an extra, with those of the extras that it names in turn.

    Args:
        project: ``[project]`` of ``pyproject.toml``.
        extra: One of its ``optional-dependencies``.
    """
    found: dict[str, Requirement] = {}
    lines, seen = list(project["dependencies"]), {extra}  # type: ignore[call-overload]
    lines += project["optional-dependencies"][extra]  # type: ignore[index]
    while lines:
        one = Requirement(lines.pop(0))
        if one.name != NAME:
            found.setdefault(one.name, one)
        for other in sorted(one.extras - seen) if one.name == NAME else ():
            seen.add(other)
            lines += project["optional-dependencies"][other]  # type: ignore[index]
    return list(found.values())


def floor(of: Requirement) -> str:
    """Pinned to its lower bound, as a line of pip's constraints.

    Raises:
        ValueError: When it has none.
    """
    bounds = [s.version for s in of.specifier if s.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{of} has no lower bound in pyproject.toml. Give it one.")
    return f"{of.name}=={bounds[0]}"


def interpreter(which: str) -> str:
    """The oldest Python that is supported, where it is installed, for the lowest versions."""
    oldest = shutil.which("python3.10") if which == "lowest" else None
    return oldest or sys.executable


def install(which: str, folder: Path) -> Path:
    """An environment with these versions; the checkout is installed editably.

    Returns:
        Its Python.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = requirements(project)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter(which), "-m", "venv", str(folder)], check=True)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{floor(one)}\n" for one in needed) if which == "lowest" else "")
    torch = next(one for one in needed if one.name == "torch")
    for what in ([str(torch)], ["--editable", f"{ROOT}[{EXTRA}]"]):  # torch alone says which build
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), *what]
        subprocess.run(command, check=True)
    return python


def main() -> int:
    """Install, say what is installed, test; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=("lowest", "highest"))
    parser.add_argument("folder", type=Path, help="of the environment")
    parser.add_argument("--workers", default="2", help="of pytest-xdist")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files, instead of all")
    args = parser.parse_args()
    python = install(args.which, args.folder.resolve())
    show = "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], "
    show += f"*(f'{{n}} {{v(n)}}' for n in {SHOWN}), sep=', ')"
    subprocess.run([str(python), "-c", show], check=True)
    command = [str(python), "-m", "pytest", "-q", "-n", args.workers, "--dist", "worksteal"]
    command += ["-m", "not slow and not long", "-p", "no:cacheprovider", *args.tests]
    command += [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    command += OLD_LIBRARIES if args.which == "lowest" else ()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    one_thread = {**clean, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=one_thread).returncode


if __name__ == "__main__":
    sys.exit(main())
