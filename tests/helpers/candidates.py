"""Small candidates and their files, good and damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_twa.candidates import Candidate
from lightning_twa.candidates.files import (
    CandidateFileError,
    Reference,
    make_directory,
    read_candidate,
    write_candidate,
)

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
