"""The rules of the house that a script can check."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from helpers.common import ROOT, TESTS

LONGEST_FILE = 400  # lines
# A folder, and the longest class in it, in lines.
FOLDERS = [("lightning_twa", 250), ("tests", None), ("examples", None)]


@pytest.mark.parametrize(("folder", "longest_class"), FOLDERS)
def test_one_idea_a_file(folder: str, longest_class: int | None) -> None:
    """Such a file is short, and so is a class."""
    too_long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        if len(text.splitlines()) > LONGEST_FILE:
            too_long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)) if longest_class else ():
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                too_long += [f"{name}: {node.name}: {lines} lines"] if lines > longest_class else []
    assert too_long == []


def test_files_of_tests_have_different_names() -> None:
    """Test folders are no packages: what a forked or spawned process imports has one name."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
    assert [path.parent.name for path in TESTS.rglob("__init__.py")] == ["helpers"]


def test_tests_import_no_tests() -> None:
    """What several tests use is in ``helpers``."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("test_"), path.name
