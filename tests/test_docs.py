"""Every Python block of README and docs runs, in order, page by page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from lightning.pytorch import callbacks

import lightning_twa

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "contributing").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line and code of each block."""
    text = page.read_text()
    return [(text[: m.start(1)].count("\n") + 1, m.group(1)) for m in BLOCK.finditer(text)]


def test_pages_with_code_are_found() -> None:
    pages = {"README.md", "quickstart.md", "averages.md", "plots.md", "five-things.md"}
    pages |= {"which-option.md", "coming-from.md", "plain-loops.md"}
    assert {page.name for page in PAGES if blocks(page)} >= pages
    assert all(page.read_text().strip() for page in PAGES)


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("peft" in code for _, code in blocks(page)):
        pytest.importorskip("peft")
    if "EMAWeightAveraging" in page.read_text() and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code in blocks(page):
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


SETTING = re.compile(r"`((?:TWACallback|CollectConfig|S\w+Config)\([^`]*\))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_in_the_text_can_be_made(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = {re.sub(r"\s+", " ", setting) for setting in SETTING.findall(prose)}
    for setting in found:
        if "..." not in setting:  # what stands for a value of the reader's
            eval(setting, vars(lightning_twa).copy())


def test_arguments_for_each_situation_are_taken() -> None:
    text = (ROOT / "docs" / "which-option.md").read_text()
    rows = re.findall(r"^\| .*? \| `(\w+=[^`]*)`.*? \| .* \|$", text, re.MULTILINE)
    assert len(rows) > 10
    for arguments in rows:
        eval(f"TWACallback({arguments})", vars(lightning_twa).copy())


def messages() -> list[str]:
    """Every string of the code, with NUL for what is put into it."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "lightning_twa").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    parts = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    made = [
        "".join(
            str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "\0"
            for part in values
        )
        for values in parts
    ]
    return plain + made


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text, known = (ROOT / "docs" / "troubleshooting.md").read_text(), messages()
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"^\| `", text, re.MULTILINE)) > 40
    for message in quoted:
        pattern = ".*?".join(re.escape(part.strip()) for part in message.split("…"))
        assert any(re.search(pattern, s, re.DOTALL) for s in known), f"no message has {message!r}"


def test_terms_are_defined_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = [
        t.strip("* ")
        for line in re.findall(r"^(\*\*.*?):", text, re.M)
        for t in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    words = [word.lower() for term in terms for word in term.split(", ")]
    assert len(words) == len(set(words))
    needed = {"averaging phase", "phase", "switch", "candidate", "direction", "held-out loss"}
    assert needed <= set(words)


def test_code_is_no_wider_than_the_page() -> None:
    for page in PAGES:
        for block in re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            wide = [line for line in block.splitlines() if len(line) > 100]
            assert wide == [], page.name


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_headings_that_pages_link_to_exist() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
            text = (page.parent / target if target else page).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_commands_name_scripts_that_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"\bexamples/[\w/]+\.py", page.read_text()):
            assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = re.search(
        r"^```\{toctree\}\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.M | re.S
    )
    assert contents is not None
    listed = {line for line in contents.group(1).split() if not line.startswith(":")}
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_links_of_the_readme_work_on_a_package_index_page() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    for name in re.findall(r"`([\w-]+\.md)`", text):
        assert (ROOT / "docs" / name).is_file() or (ROOT / name).is_file(), name


def test_readme_is_short_and_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "make demo" in text
    assert "make test" in text


GUIDES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "contributing").glob("*.md"))]


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.name)
def test_files_and_names_that_contributors_are_led_to_exist(page: Path) -> None:
    text, package = page.read_text(), ROOT / "lightning_twa"
    folders = [ROOT / name for name in ("lightning_twa", "tests", "examples", "docs")]
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*.*")]
    for name in set(re.findall(r"`([\w/]+\.(?:py|md))`", text)):
        found = (ROOT / name).is_file() or any(file.endswith(f"/{name}") for file in files)
        assert found, f"{page.name} names {name}"
    code = "\n".join(path.read_text() for path in package.rglob("*.py"))
    for owner, name in set(re.findall(r"`([A-Z]\w+)\.(\w+)(?:\([^`]*\))?`", text)):
        if re.search(rf"^class {owner}\b", code, re.MULTILINE):
            assert re.search(rf"\b{name}\b", code), f"{page.name} names {owner}.{name}"
