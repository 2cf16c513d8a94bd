"""Build wheel and sdist, and look whether they may be released: ``make release-check``.

A fault is a line that names the file and what is wrong, and the exit code is then 1. Nothing is
uploaded.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_twa"
# What whoever unpacks the sdist can test, read and build.
FOLDERS = (PACKAGE, "tests", "docs", "examples", ".ci")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")


def versions(root: Path, declared: str) -> list[str]:
    """Faults of the version, which several files name, and of its date.

    Args:
        root: Of the checkout.
        declared: By ``pyproject.toml``.
    """
    faults = []
    heading = re.search(r"^## \[(.*?)\] - (.*)$", (root / "CHANGELOG.md").read_text(), re.M)
    number, date = heading.groups() if heading else ("none", "none")
    if number != declared:
        faults.append(f"CHANGELOG.md: its newest version is {number}, not {declared}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        faults.append(f"CHANGELOG.md: {number} has the date {date!r}, not one like 2026-11-27")
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    if str(cited["version"]) != declared:
        faults.append(f"CITATION.cff: version {cited['version']}, not {declared}")
    if str(cited["date-released"]) != date:
        faults.append(f"CITATION.cff: date-released {cited['date-released']}, not {date}")
    return faults


def links(text: str) -> list[str]:
    """Faults of the README's links, which a package index shows without the files beside it."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    faults = []
    for match in LINK.finditer(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        target = match[1] or match[2]
        if target.startswith("#"):
            if target[1:] not in slugs:
                faults.append(f"README.md: no heading for the link {target}")
        elif not target.startswith("https://"):
            faults.append(f"README.md: the link {target} is not absolute (https://...)")
    return faults


def wheel_contents(names: Collection[str], tracked: Collection[str], info: str) -> list[str]:
    """Faults of what the wheel holds: the package, whole, and its metadata.

    Args:
        names: Of its files.
        tracked: Files of the checkout that git knows.
        info: The folder of its metadata.
    """
    needed = {name for name in tracked if name.startswith(f"{PACKAGE}/")}
    allowed = needed | {name for name in names if name.startswith(f"{info}/")}
    faults = [f"wheel: {name} does not belong there" for name in sorted(set(names) - allowed)]
    needed |= {f"{info}/METADATA", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
    return faults + [f"wheel: {name} is missing" for name in sorted(needed - set(names))]


def sdist_contents(names: Collection[str], tracked: Collection[str]) -> list[str]:
    """Faults of what the sdist holds, of which tests and documentation can be made.

    Args:
        names: Of its files, without the folder that they are in.
        tracked: Files of the checkout that git knows.
    """
    needed = {name for name in tracked if name.startswith(tuple(f"{f}/" for f in FOLDERS))}
    needed |= set(FILES)
    made = {"PKG-INFO", ".gitignore"}
    faults = [f"sdist: {name} is missing" for name in sorted(needed - set(names))]
    return faults + [
        f"sdist: {name} does not belong there" for name in sorted(set(names) - needed - made)
    ]


def metadata(found: Message, project: dict[str, Any], readme: str) -> list[str]:
    """Faults of the wheel's metadata, compared with ``[project]`` of ``pyproject.toml``."""
    expected = {
        "Name": project["name"],
        "Version": project["version"],
        "Summary": project["description"],
        "License-Expression": project["license"],
        "Requires-Python": project["requires-python"],
        "Description-Content-Type": "text/markdown",
    }
    faults = [
        f"metadata: {key} is {found[key]!r}, not {value!r}"
        for key, value in expected.items()
        if _as_written(key, found[key]) != _as_written(key, value)
    ]
    if str(found.get_payload()).strip() != readme.strip():
        faults.append("metadata: the description is not README.md")
    if found.get_all("Classifier", []) != project["classifiers"]:
        faults.append("metadata: classifiers are not those of pyproject.toml")
    extras = project["optional-dependencies"]
    if set(found.get_all("Provides-Extra", [])) != set(extras):
        faults.append("metadata: extras are not those of pyproject.toml")
    plain = [Requirement(line) for line in found.get_all("Requires-Dist", [])]
    always = {_without_marker(r) for r in plain if r.marker is None}
    if always != {_without_marker(Requirement(line)) for line in project["dependencies"]}:
        faults.append("metadata: dependencies are not those of pyproject.toml")
    return faults


def _as_written(key: str, value: str | None) -> Any:
    return SpecifierSet(value or "") if key == "Requires-Python" else value


def _without_marker(of: Requirement) -> tuple[str, SpecifierSet]:
    return of.name.lower().replace("_", "-"), of.specifier


def build(root: Path, to: Path) -> tuple[Path, Path]:
    """Wheel and sdist in a folder that has nothing else.

    Raises:
        SystemExit: When there are other files in it.
    """
    if to.exists() and any(to.iterdir()):
        raise SystemExit(f"{to} is not empty. Name another folder, or delete it.")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(to.resolve())]
    subprocess.run(command, cwd=root, check=True, stderr=subprocess.DEVNULL)
    (wheel,), (sdist,) = to.glob("*.whl"), to.glob("*.tar.gz")
    return wheel, sdist


def wheel_of(sdist: Path) -> set[str]:
    """Names in the wheel that is built from an unpacked sdist, as pip does it."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        subprocess.run(command, cwd=root, check=True, stderr=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        return set(zipfile.ZipFile(wheel).namelist())


def faults_of(root: Path, wheel: Path, sdist: Path) -> list[str]:
    """All that is wrong with what was built from a checkout."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    readme = (root / "README.md").read_text()
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, check=True)
    tracked = set(listed.stdout.decode().splitlines())
    stem = f"{PACKAGE}-{project['version']}"
    faults = versions(root, project["version"]) + links(readme)
    if (wheel.name, sdist.name) != (f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"):
        faults.append(f"names: {wheel.name} and {sdist.name} are not of {stem}")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel, info = set(archive.namelist()), f"{stem}.dist-info"
        found = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    with tarfile.open(sdist) as archive_of_sources:
        members = [m.name for m in archive_of_sources.getmembers() if m.isfile()]
    faults += wheel_contents(in_wheel, tracked, info)
    faults += sdist_contents([name.partition("/")[2] for name in members], tracked)
    faults += metadata(found, project, readme)
    if (made := wheel_of(sdist)) != in_wheel:
        faults.append(f"sdist: its wheel differs in {', '.join(sorted(made ^ in_wheel))}")
    return faults


def main() -> int:
    """Build, look, print; 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where wheel and sdist go; must be empty")
    wheel, sdist = build(ROOT, parser.parse_args().folder)
    faults = faults_of(ROOT, wheel, sdist)
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 2**10:.0f} KiB")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults" if faults else "version, links, contents and metadata are right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
