"""The table of stages in the documentation is the one of the code."""

from __future__ import annotations

from helpers.common import ROOT
from lightning_twa.callback import TWAHooks
from lightning_twa.phases.transitions import TABLE, Event, StageName


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "contributing" / "stages.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `") or "| event |" in line]
    start = next(i for i, line in enumerate(lines) if line.startswith("| event"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]


def test_the_documentation_has_the_table_of_the_code() -> None:
    header, *body = rows()
    assert header[2:] == [stage.value for stage in StageName]
    written = {}
    for event, _, *cells in body:
        written[Event(event.strip("`"))] = {
            stage: tuple(StageName(name.strip()) for name in cell.split(","))
            for stage, cell in zip(StageName, cells, strict=True)
            if cell
        }
    assert written == TABLE


def test_the_hooks_that_it_names_are_those_of_the_callback() -> None:
    for _, hook, *_ in rows()[1:]:
        assert hook.strip("`").split("(")[0] in vars(TWAHooks)
