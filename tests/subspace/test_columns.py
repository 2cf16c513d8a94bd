"""Which columns a process holds, and that its directions are those of one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import seeded

from lightning_twa import Subspace, SubspaceConfig, build_subspace
from lightning_twa.subspace import ParameterLayout, cut_evenly
from lightning_twa.subspace.directions import TILE


@pytest.mark.parametrize("blocks", ["global", "tensor", 500])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 64])
def test_every_column_is_held_once_and_evenly(blocks, processes) -> None:
    config = SubspaceConfig(blocks=blocks)
    whole = ParameterLayout.from_tensors(seeded(0), config.blocks)
    every = cut_evenly(whole, processes)
    assert len(every) == processes
    for i, spec in enumerate(whole.specs):
        pieces = [columns.pieces[i] for columns in every]
        assert pieces[0].start == 0
        assert pieces[-1].stop == spec.stop - spec.start
        assert all(a.stop == b.start for a, b in itertools.pairwise(pieces))
    sizes = [columns.local.numel for columns in every]
    padding = TILE * whole.num_blocks  # blocks start at a tile
    assert sum(sizes) == whole.numel
    assert max(sizes) <= (whole.numel + padding) / processes + TILE


@pytest.mark.parametrize("bits", [3, 4, 32])
def test_shards_hold_what_one_process_holds_of_their_columns(bits) -> None:
    """Codes and scales too: the low-bit error does not depend on the number of processes."""
    config = SubspaceConfig(bits=bits, blocks=2000)
    members = [seeded(i) for i in range(5)]
    one = build_subspace(members, config)
    every = cut_evenly(one.layout, 3)
    parts = [build_subspace(members, config, columns=c, mixing=one.mixing) for c in every]
    assert sum(p.nbytes for p in parts) == one.nbytes
    assert max(p.nbytes for p in parts) < 0.5 * one.nbytes
    for i, spec in enumerate(one.layout.specs):
        local = [p.directions[:, p.local_layout.specs[i].start : p.local_layout.specs[i].stop]
                 for p in parts]  # fmt: skip
        assert torch.equal(torch.cat(local, dim=1), one.directions[:, spec.start : spec.stop])


def test_a_process_without_columns(tmp_path) -> None:
    """More processes than tiles."""
    members = [seeded(i, {"w": (5, 3)}) for i in range(3)]
    for bits in (4, 32):
        one = build_subspace(members, SubspaceConfig(bits=bits))
        empty, full = cut_evenly(one.layout, 2)
        assert (empty.local.numel, full.local.numel) == (0, 15)
        nothing = build_subspace(
            members, SubspaceConfig(bits=bits), columns=empty, mixing=one.mixing
        )
        gradient = [torch.randn(0)]
        assert torch.equal(nothing.project(gradient), torch.zeros(2, 1, dtype=torch.float64))
        nothing.expand(torch.ones(2, 1), [torch.empty(0)])


def test_the_repr_of_a_shard_says_so() -> None:
    members = [seeded(i) for i in range(3)]
    one: Subspace = build_subspace(members)
    part = build_subspace(members, columns=cut_evenly(one.layout, 2)[0], mixing=one.mixing)
    assert f"D={one.layout.numel}" in repr(part)
    assert f"columns={part.local_layout.numel}" in repr(part)
    assert "columns" not in repr(one)
