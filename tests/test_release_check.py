"""``make release-check`` notices what may not be released: each fault is planted here."""

from __future__ import annotations

from email.message import Message
from typing import Any

import pytest

from helpers.common import ROOT, load_script

check = load_script(ROOT / ".ci" / "release_check.py")

INFO = "lightning_twa-0.2.0.dist-info"
TRACKED = {
    "lightning_twa/__init__.py",
    "lightning_twa/py.typed",
    "tests/conftest.py",
    "docs/index.md",
    "examples/minimal.py",
    "README.md",
}
WHEEL = {
    "lightning_twa/__init__.py",
    "lightning_twa/py.typed",
    *(f"{INFO}/{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")),
}
SDIST = TRACKED | set(check.FILES) | {"PKG-INFO"}


# --- what is built


def test_what_belongs_there_is_no_fault() -> None:
    assert check.wheel_contents(WHEEL, TRACKED, INFO) == []
    assert check.sdist_contents(SDIST, TRACKED) == []


@pytest.mark.parametrize("extra", ["tests/conftest.py", "lightning_twa/left.orig", "setup.py"])
def test_a_wheel_holds_the_package_alone(extra: str) -> None:
    found = check.wheel_contents(WHEEL | {extra}, TRACKED, INFO)
    assert found == [f"wheel: {extra} does not belong there"]


@pytest.mark.parametrize("lost", sorted(WHEEL - {f"{INFO}/RECORD"}))
def test_a_wheel_holds_all_of_it(lost: str) -> None:
    assert check.wheel_contents(WHEEL - {lost}, TRACKED, INFO) == [f"wheel: {lost} is missing"]


@pytest.mark.parametrize("lost", sorted(SDIST - {"PKG-INFO"}))
def test_an_sdist_holds_what_it_can_be_tested_with(lost: str) -> None:
    assert check.sdist_contents(SDIST - {lost}, TRACKED) == [f"sdist: {lost} is missing"]


@pytest.mark.parametrize("extra", ["docs/_build/html/index.html", "twa.ckpt"])
def test_an_sdist_holds_nothing_that_a_run_left(extra: str) -> None:
    found = check.sdist_contents(SDIST | {extra}, TRACKED)
    assert found == [f"sdist: {extra} does not belong there"]


# --- the version


def write_release(folder: Any, heading: str = "[1.2.3] - 2026-11-27", version: str = "1.2.3"):
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## [1.2.2] - 2026-01-01")
    (folder / "CITATION.cff").write_text(f'version: {version}\ndate-released: "2026-11-27"\n')
    return folder


def test_versions_that_agree(tmp_path) -> None:
    assert check.versions(write_release(tmp_path), "1.2.3") == []


@pytest.mark.parametrize(
    ("declared", "written", "fault"),
    [
        ("1.2.4", {"version": "1.2.4"}, "CHANGELOG.md: its newest version is 1.2.3, not 1.2.4"),
        ("1.2.3", {"version": "1.2.2"}, "CITATION.cff: version 1.2.2, not 1.2.3"),
        (
            "1.2.3",
            {"heading": "[1.2.3] - 2026-11-28"},
            "CITATION.cff: date-released 2026-11-27, not 2026-11-28",
        ),
        (
            "1.2.3",
            {"heading": "[1.2.3] - unreleased"},
            "CHANGELOG.md: 1.2.3 has the date 'unreleased', not one like 2026-11-27",
        ),
    ],
)
def test_versions_that_do_not(tmp_path, declared, written, fault) -> None:
    assert check.versions(write_release(tmp_path, **written), declared)[0] == fault


# --- the page of a package index


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("# Top\n[a](https://b.example/c) [d](#top)", []),
        ("[a](docs/method.md)", ["the link docs/method.md is not absolute (https://...)"]),
        ("![a](figure.png)", ["the link figure.png is not absolute (https://...)"]),
        ('<img src="figure.png">', ["the link figure.png is not absolute (https://...)"]),
        ("# Top\n[a](#bottom)", ["no heading for the link #bottom"]),
        ("```python\nf[0](x)\n```", []),
    ],
)
def test_links_of_a_readme(text: str, faults: list[str]) -> None:
    assert check.links(text) == [f"README.md: {fault}" for fault in faults]


def test_the_readme_s_own_links() -> None:
    assert check.links((ROOT / "README.md").read_text()) == []


PROJECT: dict[str, Any] = {
    "name": "p",
    "version": "1",
    "description": "d",
    "license": "MIT",
    "requires-python": ">=3.10",
    "classifiers": ["Typing :: Typed"],
    "dependencies": ["torch>=2.4", "lightning>=2.5,<3"],
    "optional-dependencies": {"plot": ["matplotlib"]},
}


def message(**changes: str) -> Message:
    """Metadata of that project, in another order than it has."""
    values = {
        "Name": "p",
        "Version": "1",
        "Summary": "d",
        "License-Expression": "MIT",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
        "Classifier": "Typing :: Typed",
        "Provides-Extra": "plot",
        "Requires-Dist": "lightning<3,>=2.5",
        **changes,
    }
    found = Message()
    for key, value in values.items():
        found[key] = value
    found["Requires-Dist"] = "torch>=2.4"
    found["Requires-Dist"] = "matplotlib; extra == 'plot'"
    found.set_payload("# Read me\n")
    return found


def test_metadata_that_are_those_of_the_project() -> None:
    assert check.metadata(message(), PROJECT, "# Read me") == []


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("Version", "2", "Version is '2', not '1'"),
        ("Requires-Python", ">=3.9", "Requires-Python is '>=3.9', not '>=3.10'"),
        ("Description-Content-Type", "text/x-rst", "Description-Content-Type is 'text/x-rst', not"),
        ("Classifier", "Private", "classifiers are not those of pyproject.toml"),
        ("Provides-Extra", "cli", "extras are not those of pyproject.toml"),
        ("Requires-Dist", "lightning>=2.5", "dependencies are not those of pyproject.toml"),
    ],
)
def test_metadata_that_are_not(key: str, value: str, fault: str) -> None:
    (found,) = check.metadata(message(**{key: value}), PROJECT, "# Read me")
    assert found.startswith(f"metadata: {fault}")


def test_the_description_is_the_readme() -> None:
    (found,) = check.metadata(message(), PROJECT, "# Another")
    assert found == "metadata: the description is not README.md"
