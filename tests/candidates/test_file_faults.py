"""Candidate files that are not what the checkpoint says."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from helpers.candidates import LINKS, place, refused, save, small
from lightning_twa.candidates import files
from lightning_twa.candidates.encoding import encode
from lightning_twa.candidates.files import (
    CandidateFileError,
    Reference,
    make_directory,
    read_candidate,
)


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
