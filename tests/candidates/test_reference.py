"""References to candidate files: what they may say, and that none leads out of the root."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from helpers.candidates import LINKS, save
from lightning_twa.candidates import files
from lightning_twa.candidates.files import (
    CandidateFileError,
    Reference,
    delete_candidate,
    read_candidate,
)

GOOD = {"name": "epoch=3", "file": "version_0/epoch=3.safetensors", "size": 5, "digest": "ab"}


# --- References


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("value", [None, True, 1.5, b"x", ["x"], {}, "other"])
def test_an_entry_that_is_missing_or_of_another_type(key: str, value: object) -> None:
    state: dict[str, Any] = dict(GOOD)
    del state[key]
    with pytest.raises(ValueError, match=f"has no entry '{key}'"):
        Reference.from_state(state)
    if value == "other":
        state[key] = 7 if key != "size" else "7"
    else:
        state[key] = value
    expected = "an int" if key == "size" else "a str"
    with pytest.raises(ValueError, match=f"Entry '{key}' of .* is a .*, not {expected}"):
        Reference.from_state(state)


def test_references_are_plain_and_ignore_further_entries() -> None:
    reference = Reference.from_state({**GOOD, "further": 1})
    assert reference.state_dict() == GOOD
    assert {type(value) for value in reference.state_dict().values()} == {str, int}
    with pytest.raises(ValueError, match="is a list, not a mapping"):
        Reference.from_state([1])  # type: ignore[arg-type]


def test_fuzzed_references(tmp_path: Path) -> None:
    root, reference = tmp_path, save(tmp_path)
    pool = [
        *reference.state_dict().values(),
        *["", ".", "..", "/", "\0", "x\0.safetensors", "\ud800.safetensors", "epoch=3"],
        *["a" * 5000 + ".safetensors", "a/" * 3000 + ".safetensors", ".safetensors", "\n"],
        *["~/.safetensors", "file:///x.safetensors", "//x/y.safetensors", "version_0"],
        *[None, -1, 0, 2**70, 1.5, b"", [], {}, True],
    ]
    for _ in range(1500):
        keys = random.sample(["name", "file", "size", "digest", "other"], random.randrange(3, 6))
        state = {**reference.state_dict(), **{key: random.choice(pool) for key in keys}}
        if random.random() < 0.2:
            del state[random.choice(list(state))]
        try:
            found = read_candidate(root, Reference.from_state(state))
        except (CandidateFileError, ValueError):
            continue
        assert found.name == reference.name
        assert {**state, **reference.state_dict()} == state, "only the true reference is read"


HOSTILE = [
    "/etc/passwd.safetensors",
    "../outside.safetensors",
    "version_0/../../outside.safetensors",
    "version_0/../version_0/epoch=3.safetensors",
    "..\\outside.safetensors",
    "C:\\outside.safetensors",
    "C:outside.safetensors",
    "\\\\server\\share\\x.safetensors",
    "//server/share/x.safetensors",
    "link.safetensors",
    "linked/outside.safetensors",
    "version_0/secret.ckpt",
    "version_0/epoch=3.safetensors/",
    "version_0/epoch=3.safetensors\0",
    "version_0",
    "",
    ".",
]


# --- Hostile checkpoints


@LINKS
@pytest.mark.parametrize("file", [*HOSTILE, "ABSOLUTE", "ABSOLUTE INSIDE"])
def test_nothing_outside_of_the_root_is_opened_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.safetensors"
    good = save(root)
    content = (root / good.file).read_bytes()
    outside.write_bytes(content)
    (root / "version_0" / "secret.ckpt").write_bytes(content)
    (root / "link.safetensors").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    file = {"ABSOLUTE": str(outside), "ABSOLUTE INSIDE": str(root / good.file)}.get(file, file)
    reference = dataclasses.replace(good, file=file)
    before = sorted(tmp_path.rglob("*"))

    def opening(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(files, "open", opening, raising=False)
    monkeypatch.setattr(files, "decode", opening)
    for function in (read_candidate, delete_candidate):
        with pytest.raises(CandidateFileError, match="outside of the storage directory"):
            function(root, reference)
    assert sorted(tmp_path.rglob("*")) == before


@LINKS
def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    reference = save(root)
    (root / "latest").symlink_to(root / "version_0")
    (tmp_path / "storage").symlink_to(root)
    linked = dataclasses.replace(reference, file="latest/epoch=3.safetensors")
    assert read_candidate(root, linked).name == "epoch=3"
    assert read_candidate(tmp_path / "storage", reference).name == "epoch=3"


def test_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reference = save(Path("storage"))
    assert reference.file == "version_0/epoch=3.safetensors"
    assert read_candidate(Path("storage"), reference).name == "epoch=3"
    assert read_candidate(tmp_path / "storage", reference).name == "epoch=3"
