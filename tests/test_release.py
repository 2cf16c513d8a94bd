"""What a release says of itself: one version everywhere, and every default that it changed."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest
import yaml

import lightning_twa
from helpers.common import ROOT, TESTS
from helpers.plain import TWACallback as Plain
from lightning_twa.__main__ import main

PAGE = (ROOT / "docs" / "migration.md").read_text()
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
BEFORE: dict[str, dict[str, Any]] = json.loads(
    (TESTS / "fixtures" / "defaults_0_1_0.json").read_text()
)
ROW = re.compile(r"^\| `(\w+\.\w+)` \| (.+?) \| `(.+?)` \| `(.+?)` \|$", re.MULTILINE)
ROWS = {name: (then, now, line) for name, then, now, line in ROW.findall(PAGE)}
NONE = "none"  # of a setting that there was not


def defaults(owner: str) -> dict[str, Any]:
    """Of the arguments that have one, by name."""
    parameters = inspect.signature(getattr(lightning_twa, owner)).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not p.empty}


NOW = {owner: defaults(owner) for owner in BEFORE}


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value))


def names(of: dict[str, dict[str, Any]]) -> set[str]:
    return {f"{owner}.{name}" for owner, values in of.items() for name in values}


def look_up(of: dict[str, dict[str, Any]], name: str) -> Any:
    owner, _, argument = name.partition(".")
    return of[owner][argument]


# --- the version


def test_version_is_the_same_everywhere(capsys) -> None:
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    version = declared.group(1)
    stale = "the environment has the metadata of another version: make venv"
    assert lightning_twa.__version__ == version, stale
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["lightning-twa", version]
    heading = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (heading[1], heading[2]) == (version, cited["date-released"])
    assert cited["version"] == version


def test_the_citation_is_of_this_software_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the format needs
    declared = (ROOT / "pyproject.toml").read_text()
    assert f'name = "{cited["title"]}"' in declared
    assert f'license = "{cited["license"]}"' in declared
    assert f'description = "{cited["abstract"]}"' in declared
    assert "2205.13104v4" in cited["references"][0]["url"]


# --- defaults that changed


def test_every_default_that_changed_has_a_row() -> None:
    kept = names(BEFORE) & names(NOW)
    changed = {n for n in kept if plain(look_up(NOW, n)) != look_up(BEFORE, n)}
    with_effect = {name for name, (then, _, _) in ROWS.items() if then == NONE}
    assert changed | with_effect == set(ROWS)
    assert len(ROWS) == len(re.findall(r"^\| `\w+\.\w+` ", PAGE, re.MULTILINE)) > 5
    assert names(BEFORE) <= names(NOW), "an argument is gone, which the page denies"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_defaults_of_both_versions(name: str) -> None:
    then, now, line = ROWS[name]
    assert eval(now) == look_up(NOW, name)
    if then == NONE:
        assert name not in names(BEFORE)
    else:
        assert plain(eval(then.strip("`"))) == look_up(BEFORE, name)
    owner, _, argument = name.partition(".")
    assert line.startswith(f"{owner}(")
    given = re.search(rf"\b{argument}=(.+?)\)$", line)
    assert given is not None
    assert eval(given[1]) != look_up(NOW, name)  # else the line changes nothing
    if then != NONE:
        assert plain(eval(given[1])) == look_up(BEFORE, name)
    if owner != "average":
        eval(line, vars(lightning_twa).copy())


def test_every_new_argument_is_named_once() -> None:
    section = PROSE[PROSE.index("## Settings that are new") : PROSE.index("## What has no setting")]
    listed = re.findall(r"`(\w+\.\w+)`", section)
    new = names(NOW) - names(BEFORE)
    with_effect = {name for name, (then, _, _) in ROWS.items() if then == NONE}
    assert sorted(listed) == sorted(new - with_effect)


def test_the_arguments_before_those_that_are_new_are_where_they_were() -> None:
    now, then = list(NOW["TWACallback"]), list(BEFORE["TWACallback"])
    same = next(i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b)
    words = {8: "nine"}
    assert f"passes {words[same]} arguments without their names" in PAGE
    first, second = now[same : same + 2]
    assert f"`{first}` and `{second}` stand before `{then[same]}`" in PAGE


def test_all_at_once_is_what_the_checkpoints_of_0_1_0_go_on_with() -> None:
    """They are compared with what 0.1.0 itself ended with in ``test_earlier_versions.py``."""
    block = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    namespace: dict[str, Any] = {}
    exec(block[1], namespace)
    assert namespace["as_in_0_1_0"].settings == Plain(save_average=False).settings
    for name, (_, _, line) in ROWS.items():
        given = line.partition("(")[2][:-1]
        assert name.startswith("average.") or given in block[1], name
