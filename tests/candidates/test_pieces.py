"""Files of which each piece has a digest, so that several cores verify them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from lightning_twa.candidates import Candidate, CandidateFileError, Reference, disk, files
from lightning_twa.candidates import reference as reference_module


@pytest.mark.parametrize("rest", [0, 1])
def test_each_piece_has_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: int
) -> None:
    """Of a file that several cores verify; a checkpoint names them."""
    for module in (files, reference_module):
        monkeypatch.setattr(module, "PIECE", 256)
    where = disk.Disk(tmp_path, in_pieces=True)
    weight = torch.arange(512 + rest, dtype=torch.uint8)
    _, (reference,) = where.write(lambda: Candidate("x", {"w": weight}, {}))
    content = (tmp_path / reference.file).read_bytes()
    pieces = [content[i : i + 256] for i in range(0, len(content), 256)]
    assert reference.pieces == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    state = reference.state_dict()
    assert Reference.from_state(state) == reference
    assert torch.equal(where.read([reference]).parameters["w"], weight)
    for at in range(0, len(content), 100):
        damaged = bytearray(content)
        damaged[at] ^= 2
        (tmp_path / reference.file).write_bytes(damaged)
        for read in (where.read, where.read_here):
            with pytest.raises(CandidateFileError, match="is damaged: its SHA-256 is another one"):
                read([reference])
    for wrong in ("00", ["00"], [1] * len(pieces), reference.pieces[:-1]):
        with pytest.raises(ValueError, match="'pieces'"):
            Reference.from_state({**state, "pieces": wrong})
