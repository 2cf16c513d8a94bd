"""Candidate files: mapped into memory, and written whole or not at all."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from helpers.candidates import names, refused, same, save, small
from helpers.common import ROOT, TESTS
from helpers.files import mapped
from lightning_twa.candidates import Candidate, encoding, files
from lightning_twa.candidates.files import (
    delete_candidate,
    make_directory,
    read_candidate,
    write_candidate,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# --- Memory


@LINUX
def test_tensors_are_the_mapped_file(tmp_path: Path) -> None:
    count = 2**21
    candidate = Candidate("x", {str(i): torch.full((count,), float(i)) for i in range(4)}, {})
    reference = save(tmp_path, candidate)
    path = (tmp_path / reference.file).resolve()
    del candidate
    again = read_candidate(tmp_path, reference)
    before = mapped(path)
    assert before["Size"] * 1024 >= reference.size
    assert before["Rss"] <= 1024, "32 MiB were checked, but not made resident"
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in lines
        if line.endswith(str(path))
    ]
    for tensor in again.parameters.values():
        start = tensor.data_ptr()
        assert any(a <= start and start + tensor.nbytes <= b for a, b in ranges)
    assert float(again.parameters["1"].sum()) == count
    after = mapped(path)
    assert 4 * count // 1024 <= after["Rss"] < 2 * 4 * count // 1024, "one tensor of four is used"
    assert after["Anonymous"] == 0
    del again, tensor
    assert mapped(path) == {}


@LINUX
def test_a_deleted_file_stays_readable_and_writing_does_not_change_it(tmp_path: Path) -> None:
    candidate = small()
    reference = save(tmp_path, candidate)
    first, second = read_candidate(tmp_path, reference), read_candidate(tmp_path, reference)
    first.parameters["b"].zero_()
    assert same(second.parameters["b"], candidate.parameters["b"])
    second = read_candidate(tmp_path, reference)
    delete_candidate(tmp_path, reference)
    assert names(tmp_path / "version_0") == []
    assert all(same(second.parameters[k], t) for k, t in candidate.parameters.items())
    delete_candidate(tmp_path, reference)
    refused(tmp_path, reference, "is missing")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    if sys.platform != "linux":
        pytest.skip("forks, and looks into /proc")
    root = tmp_path_factory.mktemp("processes")
    output = subprocess.run(
        [sys.executable, "-m", "helpers.files", str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    ).stdout
    return root, json.loads(output)


# --- Several processes


@pytest.mark.long
def test_racing_processes_get_different_directories(
    processes: tuple[Path, dict[str, Any]],
) -> None:
    root, results = processes
    made = [name for child in results["race"] for name in child]
    assert sorted(made) == sorted({f"version_{k}" for k in range(100)})
    assert names(root / "deep" / "race") == sorted(made)


def test_processes_share_the_pages(processes: tuple[Path, dict[str, Any]]) -> None:
    for usage in processes[1]["share"]:
        assert usage["Rss"] >= 8 * 1024
        assert usage["Anonymous"] == 0
        assert usage["Pss"] <= 0.6 * usage["Rss"], "each is charged half of what both use"


def complete(path: Path) -> bool:
    file = safetensors.torch.load_file(path)
    return all(bool((file[f"parameters.{i}"] == i).all()) for i in range(8)) and len(file) == 9


def test_a_killed_writer_leaves_a_complete_file_or_none(
    processes: tuple[Path, dict[str, Any]],
) -> None:
    there = {}
    for step, signal, directory in processes[1]["kill"]:
        assert signal == 9, step
        finals = [n for n in names(Path(directory)) if not n.endswith(".tmp")]
        assert finals in ([], ["epoch=3.safetensors"])
        assert all(complete(Path(directory) / name) for name in finals)
        there[step] = bool(finals)
    assert there == {
        "header": False,
        "write": False,
        "fsync": False,
        "link": False,
        "unlink": True,
        "directory": True,
    }
    anytime = Path(processes[1]["anytime"])
    finals = [name for name in names(anytime) if not name.endswith(".tmp")]
    assert "first.safetensors" in finals
    assert all(complete(anytime / name) for name in finals)


class Faulty:
    """A file that fails at a write."""

    def __init__(self, file: Any, error: BaseException, at: int) -> None:
        self.file, self.error, self.left = file, error, at

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: memoryview) -> int:
        if self.left == 0:
            self.file.write(data[: len(data) // 2])
            raise self.error
        self.left -= 1
        return self.file.write(data)


FULL = OSError(errno.ENOSPC, "No space left on device")


# --- Writing fails


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt("stop"), OSError(errno.EIO, "stop")])
@pytest.mark.parametrize("step", [0, 1, 3, "fsync", "link", "encode"])
def test_a_failed_write_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: int | str
) -> None:
    directory, candidate = make_directory(tmp_path), small()

    def fail(*_: object) -> None:
        raise error

    def opening(path: Path, mode: str) -> Faulty:
        assert isinstance(step, int)
        return Faulty(builtins.open(path, mode), error, step)

    with monkeypatch.context() as patch:
        if isinstance(step, int):
            patch.setattr(files, "open", opening, raising=False)
        elif step == "encode":
            patch.setattr(encoding, "_memory", fail)
        else:
            patch.setattr(os, step, fail)
        with pytest.raises(type(error), match=r"stop|No space"):
            write_candidate(tmp_path, directory, candidate)
    assert names(directory) == []
    reference = write_candidate(tmp_path, directory, candidate)
    assert same(read_candidate(tmp_path, reference).parameters["a"], candidate.parameters["a"])


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory(tmp_path)

    def opening(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", opening, raising=False)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*epoch=3\..*\.tmp'"):
        write_candidate(tmp_path, directory, small())
    assert names(directory) == []


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_existing_file_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, when: str
) -> None:
    directory = make_directory(tmp_path)
    path, fsync = directory / "epoch=3.safetensors", os.fsync

    def slow(descriptor: int) -> None:
        path.write_bytes(b"somebody else's")
        fsync(descriptor)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if when == "before":
        path.write_bytes(b"somebody else's")
    else:
        monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        write_candidate(tmp_path, directory, small())
    assert path.read_bytes() == b"somebody else's"
    assert names(directory) == [path.name]


def no_links(*_: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_file_systems_without_links_or_without_fsync_of_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", only_files)
    candidate = small()
    reference = save(tmp_path, candidate)
    assert names(tmp_path / "version_0") == ["epoch=3.safetensors"]
    assert same(read_candidate(tmp_path, reference).parameters["b"], candidate.parameters["b"])


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "/a", "a\\b", "C:a"])
def test_a_name_never_leaves_the_directory(tmp_path: Path, name: str) -> None:
    directory = make_directory(tmp_path)
    if name == "..":
        assert write_candidate(tmp_path, directory, small(name)).file == "version_0/...safetensors"
        return
    with pytest.raises(ValueError, match=f"cannot have the name {re.escape(repr(name))}"):
        write_candidate(tmp_path, directory, small(name))


def test_a_directory_outside_of_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not in the subpath"):
        write_candidate(tmp_path / "a", make_directory(tmp_path / "b"), small())


def test_directories_are_numbered(tmp_path: Path) -> None:
    made = [make_directory(tmp_path / "deep" / "root", name) for name in ("version", "run", "run")]
    assert [path.name for path in made] == ["version_0", "run_0", "run_1"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        make_directory(tmp_path / "file")
