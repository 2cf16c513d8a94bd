"""Weights from checkpoint files: which files are found, and under which names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.candidates import LINKS
from lightning_twa.candidates import Candidate
from lightning_twa.candidates.files import write_candidate
from lightning_twa.candidates.find import find_files, unique_names
from lightning_twa.candidates.readers import read_file


def touch(root: Path, *names: str) -> list[Path]:
    """Empty files, which are found but not read."""
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


# --- Files


def test_a_pattern_has_natural_order(tmp_path: Path) -> None:
    names = ["epoch=2.ckpt", "epoch=10.ckpt", "epoch=10-v1.ckpt", "epoch=9-step=90.ckpt", "a.pt"]
    touch(tmp_path, *names, "epoch=3.txt")
    found = find_files(str(tmp_path / "epoch*.ckpt"))
    assert [p.name for p in found] == [
        "epoch=2.ckpt",
        "epoch=9-step=90.ckpt",
        "epoch=10-v1.ckpt",
        "epoch=10.ckpt",
    ]


def test_directories_of_a_pattern_have_natural_order_and_are_no_files(tmp_path: Path) -> None:
    touch(tmp_path, "run_10/last.ckpt", "run_9/last.ckpt", "run_9/x/y/best.ckpt", "last.ckpt")
    found = find_files(f"{tmp_path}/**/*t*")
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "last.ckpt",
        "run_9/last.ckpt",
        "run_9/x/y/best.ckpt",
        "run_10/last.ckpt",
    ]


def test_equal_numbers_have_an_order(tmp_path: Path) -> None:
    touch(tmp_path, "1.pt", "01.pt", "001.pt")
    assert [p.name for p in find_files(tmp_path / "*.pt")] == ["001.pt", "01.pt", "1.pt"]


def test_items_keep_their_order_and_files_come_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.ckpt", "b.pt", "c.pth", "d.bin", "e.safetensors", "f.CKPT")
    items = [tmp_path / "c.pth", str(tmp_path / "*.ckpt"), tmp_path / "x/../c.pth", tmp_path / "*"]
    (tmp_path / "x").mkdir()
    found = find_files(items)
    assert [p.name for p in found] == [
        "c.pth",
        "a.ckpt",
        "b.pt",
        "d.bin",
        "e.safetensors",
        "f.CKPT",
    ]


@LINKS
def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (file,) = touch(tmp_path, "epoch=3.ckpt")
    (tmp_path / "last.ckpt").symlink_to(file)
    assert find_files(tmp_path / "*.ckpt") == [file]
    assert find_files([tmp_path / "last.ckpt", file]) == [tmp_path / "last.ckpt"]
    file.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt does not exist"):
        find_files(tmp_path / "last.ckpt")


@pytest.mark.parametrize("item", ["~/a.ckpt", "~/*.ckpt", Path("~/a.ckpt")])
def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: Any, item: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = touch(tmp_path, "a.ckpt")
    assert find_files(item) == paths


def test_an_existing_path_is_no_pattern(tmp_path: Path) -> None:
    file, _ = touch(tmp_path, "a[1].ckpt", "a1.ckpt")
    assert find_files(file) == [file]
    (inside,) = touch(tmp_path, "run[2]/epoch=1.safetensors")
    assert find_files(inside.parent) == [inside]


def test_a_directory_means_its_candidates(tmp_path: Path) -> None:
    names = [f"{name}.safetensors" for name in ("epoch=2", "epoch=10", "step=3", "step=20")]
    expected = touch(tmp_path, *names)
    touch(tmp_path, "frozen.safetensors", "epoch=1.ckpt", "x.tmp", "deeper/epoch=1.safetensors")
    assert find_files(tmp_path) == expected


@pytest.mark.parametrize("inside", [True, False])
def test_candidates_of_a_sharded_run_are_refused(tmp_path: Path, inside: bool) -> None:
    candidate = Candidate("epoch=1", {"w": torch.randn(2)}, {})
    part = tmp_path / "version_0" / "rank_1_of_2"
    part.mkdir(parents=True)
    write_candidate(tmp_path, part, candidate)
    with pytest.raises(ValueError, match=r"sharded parameters.*gathered on one process"):
        find_files(part if inside else part.parent)
    with pytest.raises(ValueError, match=r"epoch=1\.safetensors holds a part of the weights"):
        read_file(part / "epoch=1.safetensors")


def test_a_directory_without_candidates_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "frozen.safetensors", "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"but 1 .*pattern, '.*/\*\.ckpt'") as caught:
        find_files([tmp_path])
    assert str(tmp_path) in str(caught.value)
    touch(tmp_path, "version_2/epoch=1.safetensors", "version_10/epoch=1.safetensors", "x/a.ckpt")
    with pytest.raises(ValueError, match=r"of 2 run\(s\).*such as .*version_10\.$"):
        find_files(tmp_path)


def test_a_sharded_checkpoint_is_refused_and_not_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "epoch=1.ckpt/.metadata", "epoch=1.ckpt/__0_0.distcp", "epoch=2.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt is a directory.*gathered"):
        find_files(tmp_path / "*.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt holds no candidates.*sharded .*gathered"):
        find_files(tmp_path / "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt is a directory"):
        read_file(tmp_path / "epoch=1.ckpt")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"a.ckpt"


@pytest.mark.parametrize("item", [3, None, b"a.ckpt", "", BytesPath(), ["a.ckpt"]])
def test_an_item_that_is_no_path_is_refused(item: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoints has the item .*a str or a Path") as caught:
        find_files([item])
    assert repr(item) in str(caught.value)


@pytest.mark.parametrize("items", [[], (), 3, None, b"a.ckpt", {"a.ckpt"}, iter(["a.ckpt"])])
def test_what_is_no_list_of_items_is_refused(items: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoints is .*Give a path, a pattern") as caught:
        find_files(items)
    assert repr(items) in str(caught.value)


def test_a_pattern_without_files_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.ckpt", "folder/b.ckpt")
    for pattern in ("*.pt", "f*", "missing/*.ckpt", "b?.ckpt", "[xy].ckpt"):
        with pytest.raises(ValueError, match=re.escape(pattern) + "' matches no file"):
            find_files([tmp_path / "a.ckpt", tmp_path / pattern])
    with pytest.raises(ValueError, match=r"b\.ckpt does not exist, or is no regular"):
        find_files([tmp_path / "a.ckpt", tmp_path / "b.ckpt"])
    with pytest.raises(ValueError, match=r"b\.ckpt does not exist, or is no regular"):
        read_file(tmp_path / "b.ckpt")


@pytest.mark.parametrize("item", ["a.txt", "*", "none"])
def test_other_suffixes_are_refused(tmp_path: Path, item: str) -> None:
    touch(tmp_path, "a.txt", "none")
    with pytest.raises(ValueError, match=r"(a\.txt|none) has the suffix .*\.ckpt, \.pt, \.pth"):
        find_files(tmp_path / item)
    with pytest.raises(ValueError, match=r"a\.txt has the suffix '\.txt'"):
        read_file(tmp_path / "a.txt")


# --- Names of candidates


def test_names_are_stems_where_these_are_unique() -> None:
    paths = ["run_1/last.ckpt", "run_2/last.ckpt", "run_2/epoch=3.ckpt", "best.v1.pt"]
    expected = ["run_1/last", "run_2/last", "epoch=3", "best.v1"]
    assert unique_names([Path(path) for path in paths]) == expected
    assert unique_names([]) == []


def test_names_go_as_far_up_as_needed() -> None:
    paths = [Path("x/1/a/last.ckpt"), Path("x/2/a/last.ckpt"), Path("x/2/b/last.ckpt")]
    assert unique_names(paths) == ["1/a/last", "2/a/last", "b/last"]


def test_names_of_a_file_here_and_one_below(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = unique_names([Path("last.ckpt"), Path("run/last.ckpt"), tmp_path / "run" / "x.pt"])
    assert names == [f"{tmp_path.name}/last", "run/last", "x"]


def test_names_keep_the_suffix_where_only_it_differs() -> None:
    paths = [Path("a/last.ckpt"), Path("a/last.pt"), Path("b/other.pt")]
    assert unique_names(paths) == ["last.ckpt", "last.pt", "other"]
    paths = [Path("last.ckpt"), Path("last.pt"), Path("x/last.ckpt.pt"), Path("y/last.pt")]
    assert len(set(unique_names(paths))) == 4


def test_a_path_given_twice_has_no_name() -> None:
    with pytest.raises(ValueError, match=r"a.last\.ckpt is given twice"):
        unique_names([Path("a/last.ckpt"), Path("b.ckpt"), Path("a/last.ckpt")])
