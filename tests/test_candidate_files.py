"""Candidates as files: what is written is read, whole or not at all, and from inside the root."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.common import ROOT, TESTS
from helpers.files import mapped
from torch import Tensor

from lightning_twa.candidates import Candidate, encoding, files
from lightning_twa.candidates.encoding import encode
from lightning_twa.candidates.files import (
    CandidateFileError,
    Reference,
    delete_candidate,
    make_directory,
    read_candidate,
    write_candidate,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
LINKS = pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")


def small(name: str = "epoch=3") -> Candidate:
    return Candidate(
        name, {"b": torch.randn(3, 5), "a": torch.randn(7)}, {"count": torch.tensor(3)}
    )


def save(root: Path, candidate: Candidate | None = None) -> Reference:
    return write_candidate(root, make_directory(root), candidate or small())


def place(root: Path, content: bytes, name: str = "epoch=3") -> Reference:
    """Any bytes, under a reference whose size and digest fit them."""
    path = make_directory(root) / f"{name}.safetensors"
    path.write_bytes(content)
    file = path.relative_to(root).as_posix()
    return Reference(name, file, len(content), hashlib.sha256(content).hexdigest())


def refused(root: Path, reference: Reference, match: str) -> str:
    with pytest.raises(CandidateFileError, match=match) as caught:
        read_candidate(root, reference)
    return str(caught.value)


def same(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (a.resolve_conj(), b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- What is written is read


def awkward() -> Candidate:
    base = torch.randn(6, 4)
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -0.0, 1e-45])
    return Candidate(
        "step=120",
        {
            "z.weight": base,
            "tied": base,
            "row": base[2],
            "transposed": base.t(),
            "strided": base[::2, 1::2],
            "expanded": torch.tensor([1.5]).expand(3, 2),
            "scalar": torch.tensor(1.25),
            "empty": torch.empty(0, 3),
            "half": torch.randn(3).half(),
            "brain": torch.randn(3).bfloat16(),
            "double": torch.randn(3, dtype=torch.float64),
            "eight": torch.randn(5).to(torch.float8_e4m3fn),
            "special": special,
            "ünïcode \"'\n": torch.randn(1),
            "needs.grad": torch.nn.Parameter(torch.randn(2)),
            "": torch.randn(2),
        },
        {
            "z.weight": torch.zeros(2),
            "flag": torch.tensor(True),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(3, dtype=torch.uint8),
            "short": torch.arange(3, dtype=torch.int16),
            "count": torch.tensor(2**62 + 1),
            "none": torch.empty(0, dtype=torch.int32),
            "fine": torch.tensor([0.1]),
        },
    )


def test_a_round_trip_is_bitwise_and_keeps_the_order(tmp_path: Path) -> None:
    candidate = awkward()
    reference = save(tmp_path, candidate)
    path = tmp_path / reference.file
    content = path.read_bytes()
    assert reference.file == "version_0/step=120.safetensors"
    assert (reference.name, reference.size) == ("step=120", len(content))
    assert reference.digest == hashlib.sha256(content).hexdigest()
    assert names(path.parent) == ["step=120.safetensors"]
    again = read_candidate(tmp_path, Reference.from_state(reference.state_dict()))
    assert again.name == candidate.name
    for before, after in [
        (candidate.parameters, again.parameters),
        (candidate.buffers, again.buffers),
    ]:
        assert list(after) == list(before)
        assert all(same(before[name], after[name]) for name in before)
        assert all(t.data_ptr() % t.element_size() == 0 for t in after.values())
        assert not any(t.requires_grad for t in after.values())


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    candidate = small()
    path = tmp_path / save(tmp_path, candidate).file
    expected = {f"parameters.{k}": t for k, t in candidate.parameters.items()}
    expected["buffers.count"] = torch.tensor(3)
    found = safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    assert all(same(found[k], expected[k]) for k in expected)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {"format": "pt", "format_version": "1", "candidate": "epoch=3"}
        assert file.metadata() == metadata


def test_a_candidate_without_tensors(tmp_path: Path) -> None:
    assert read_candidate(tmp_path, save(tmp_path, Candidate("x", {}, {}))) == Candidate(
        "x", {}, {}
    )


def test_complex_buffers_are_stored_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate("x", {}, {"rope": torch.randn(4, dtype=torch.complex64).conj()})
    if encoding._known(torch.complex64):
        again = read_candidate(tmp_path, save(tmp_path, candidate))
        assert torch.equal(again.buffers["rope"], candidate.buffers["rope"])
    monkeypatch.setattr(encoding, "_known", lambda dtype: dtype != torch.complex64)
    with pytest.raises(TypeError, match=r"'buffers\.rope' has dtype torch\.complex64.*cannot"):
        save(tmp_path, candidate)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()]
)
def test_a_tensor_that_no_file_can_hold_is_named(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(TypeError, match=r"'buffers\.odd' has dtype .* cannot store"):
        save(tmp_path, Candidate("x", {}, {"odd": tensor}))
    assert names(tmp_path / "version_0") == []


def test_at_most_one_tensor_is_copied() -> None:
    base = torch.randn(4, 2**16)
    parts = encode(Candidate("x", {"a": base, "b": base[1], "c": base.t()}, {}))
    next(parts)
    addresses = [torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in parts]
    assert addresses[:2] == [base.data_ptr(), base[1].data_ptr()]


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


# --- Several processes


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


# --- Writing fails


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


# --- Files that are not what the checkpoint says


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Reference, Path]:
    reference = save(tmp_path)
    return tmp_path, reference, tmp_path / reference.file


Written = tuple[Path, Reference, Path]


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing. Restore"),
    "directory missing": (lambda p: p.parent.rename(p.parent.with_name("other")), "is missing"),
    "a directory": (directory_instead, "is not a regular file"),
    "a pipe": (pipe_instead, "is not a regular file"),
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes instead of .*: it is truncated"),
    "cut by 1": (lambda p: edit(p, lambda c: c.__delitem__(slice(-1, None))), "it is truncated"),
    "cut in half": (
        lambda p: edit(p, lambda c: c.__delitem__(slice(len(c) // 2, None))),
        "it is truncated",
    ),
    "cut to 8": (lambda p: edit(p, lambda c: c.__delitem__(slice(8, None))), "has 8 bytes"),
    "appended": (lambda p: edit(p, lambda c: c.extend(b"\0")), "bytes instead of"),
    "zeroed": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "is damaged"),
    "a loop": (lambda p: (p.unlink(), p.symlink_to(p)), "outside of the storage|not readable"),
}


@LINKS
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_with_the_path(written: Written, fault: str) -> None:
    root, reference, path = written
    harm, match = FAULTS[fault]
    harm(path)
    assert reference.file in refused(root, reference, match)


def test_a_flipped_bit_anywhere(written: Written) -> None:
    root, reference, path = written
    content = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(content)
        flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        refused(root, reference, "is damaged: its SHA-256")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read(
    written: Written, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root, reference, path = written

    def opening(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "open", opening, raising=False)
    assert str(path) in refused(root, reference, "is not readable .*Check its permissions")


def rewritten(
    root: Path, change: Callable[[dict[str, Any]], object], data: bytes = b""
) -> Reference:
    """A file whose header was forged, with the size and digest that belong to it."""
    content = b"".join(encode(small()))
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    change(header)
    text = json.dumps(header).encode()
    return place(root, len(text).to_bytes(8, "little") + text + (data or content[length:]))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (
        lambda h: h["__metadata__"].update(format_version="2"),
        "has format_version '2', but this version of lightning_twa reads '1'. Read it with",
    ),
    "no version": (lambda h: h["__metadata__"].pop("format_version"), "has format_version None"),
    "no metadata": (lambda h: h.pop("__metadata__"), "has format_version None"),
    "metadata of numbers": (lambda h: h["__metadata__"].update(x=1), "is not a safetensors file"),
    "other candidate": (
        lambda h: h["__metadata__"].update(candidate="epoch=4"),
        "holds candidate 'epoch=4', but the checkpoint expects 'epoch=3'",
    ),
    "no candidate": (lambda h: h["__metadata__"].pop("candidate"), "it names no candidate"),
    "other prefix": (
        lambda h: h.update(pickled=h.pop("parameters.a")),
        "not written by lightning_twa .'pickled' is no parameter",
    ),
    "no offsets": (lambda h: h["buffers.count"].pop("data_offsets"), "is not a safetensors file"),
    "gap": (lambda h: h.pop("parameters.b"), "is not a safetensors file"),
    "overlap": (lambda h: h.update({"buffers.x": h["buffers.count"]}), "is not a safetensors"),
    "larger": (lambda h: h["parameters.a"].update(shape=[8]), "is not a safetensors file"),
    "huge": (lambda h: h["parameters.a"].update(shape=[2**62, 2**62]), "is not a safetensors"),
    "huge but empty": (
        lambda h: h.update({"buffers.x": spec("F32", [0, 2**63], 0)}),
        "is not a safetensors file",
    ),
    "negative": (lambda h: h["parameters.a"].update(shape=[-7]), "is not a safetensors file"),
    "unknown dtype": (lambda h: h["parameters.a"].update(dtype="F31"), "is not a safetensors"),
    "deep": (lambda h: h.update(x=nested(900)), "is not a safetensors file"),
}


def spec(dtype: str, shape: list[int], start: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start]}


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_header_is_refused(tmp_path: Path, forgery: str) -> None:
    change, match = FORGED[forgery]
    reference = rewritten(tmp_path, change)
    assert str(tmp_path / reference.file) in refused(tmp_path, reference, match)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        b"\x02" + b"\0" * 7 + b"{}",
        b"\x80\x04N.",
        b"PK\3\4",
    ],
)
def test_what_is_not_safetensors(tmp_path: Path, content: bytes) -> None:
    reference = place(tmp_path, content)
    refused(tmp_path, reference, "is not a safetensors file|has format_version None")


def mutations(count: int) -> Iterator[bytes]:
    """Random bytes, and good files with bytes changed, mostly in the header."""
    good = b"".join(encode(small()))
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(count):
        if i % 4 == 0:
            yield random.randbytes(random.randrange(200))
            continue
        content = bytearray(good)
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(header)
            if i % 4 == 1:
                content[at] = random.randrange(256)
            elif i % 4 == 2:
                content[at : at + random.randrange(9)] = b""
            else:
                content[at:at] = random.choice(
                    [b"0", b"9" * 20, b'"', b"{", b"\\ud800", b"[]", b"-"]
                )
        if i % 3 == 0:
            content[:8] = (header - 8 + len(content) - len(good)).to_bytes(8, "little")
        yield bytes(content)


def test_fuzzed_files(tmp_path: Path) -> None:
    directory = make_directory(tmp_path)
    path, caught, read = directory / "epoch=3.safetensors", 0, 0
    for content in mutations(1500):
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        reference = Reference("epoch=3", "version_0/epoch=3.safetensors", len(content), digest)
        try:
            candidate = read_candidate(tmp_path, reference)
        except CandidateFileError:
            caught += 1
        else:  # a header can change and stay one: another name, or an exchanged dtype
            read += 1
            assert candidate.name == "epoch=3"
            assert not content.startswith(bytes(8))
            safetensors.torch.load(content)
        with pytest.raises(CandidateFileError, match="is damaged"):
            read_candidate(tmp_path, dataclasses.replace(reference, digest="0" * 64))
    assert caught > 1000
    assert read < 300


# --- References


GOOD = {"name": "epoch=3", "file": "version_0/epoch=3.safetensors", "size": 5, "digest": "ab"}


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


def test_fuzzed_references(written: Written) -> None:
    root, reference, _ = written
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


# --- Hostile checkpoints


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
