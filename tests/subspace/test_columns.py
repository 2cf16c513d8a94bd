"""Which columns a process holds, and that its directions are those of one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import seeded
from torch import Tensor

from lightning_twa import Subspace, SubspaceConfig, build_subspace
from lightning_twa.subspace import (
    Columns,
    ParameterLayout,
    cut_evenly,
    held_everywhere,
    held_locally,
)
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


def test_cuts_are_at_tiles_and_an_uneven_rest_goes_round() -> None:
    whole = ParameterLayout.from_tensors({"a": torch.zeros(TILE + 1), "b": torch.zeros(3 * TILE)})
    first, second = cut_evenly(whole, 2)  # five tiles: b starts a group after a's last one
    assert first.pieces == (slice(0, TILE + 1), slice(0, TILE - 128))
    assert second.pieces == (slice(TILE + 1, TILE + 1), slice(TILE - 128, 3 * TILE))
    assert [spec.start for spec in second.local.specs] == [0, 0]
    assert second.local.numel == 2 * TILE + 128
    assert first.counted == second.counted == (True, True)
    assert second.whole is whole


def test_what_is_picked_of_a_tensor() -> None:
    whole = ParameterLayout.from_tensors({"a": torch.zeros(3, 4)})
    local = ParameterLayout.from_tensors({"a": torch.zeros(5)})
    values = torch.arange(12.0).view(3, 4)
    cut = Columns(whole, local, (slice(2, 7),), (True,))
    assert cut.pick(0, values).tolist() == [2, 3, 4, 5, 6]
    assert Columns(whole, whole, None, (True,)).pick(0, values).tolist() == list(range(12))


def test_processes_that_hold_everything_take_turns_in_counting() -> None:
    whole = ParameterLayout.from_tensors({k: torch.zeros(2) for k in "abcde"})
    every = [held_everywhere(whole, rank, 3) for rank in range(3)]
    assert [columns.counted for columns in every] == [
        (True, False, False, True, False),
        (False, True, False, False, True),
        (False, False, True, False, False),
    ]
    assert all(columns.local is whole and columns.pieces is None for columns in every)


class Placement:
    def __init__(self, shard: bool) -> None:
        self.shard = shard

    def is_shard(self) -> bool:
        return self.shard


class Sharded:
    """What is read of a DTensor."""

    def __init__(self, part: Tensor, place: list[int] | None, shards: list[bool]) -> None:
        self.part, self.place = part, place
        self.placements = [Placement(shard) for shard in shards]
        self.device_mesh = self

    def get_coordinate(self) -> list[int] | None:
        return self.place

    def to_local(self) -> Tensor:
        return self.part


@pytest.mark.parametrize("rank", [0, 1])
def test_of_equal_parts_the_one_at_the_origin_counts(rank) -> None:
    part = torch.zeros(2, 3)
    cases: dict[str, tuple[Any, bool]] = {
        "plain": (torch.zeros(2, 3), rank == 0),
        "shard": (Sharded(part, [5], [True]), True),
        "first replica": (Sharded(part, [0], [False]), True),
        "second replica": (Sharded(part, [1], [False]), False),
        "first replica of a shard": (Sharded(part, [0, 3], [False, True]), True),
        "second replica of a shard": (Sharded(part, [1, 3], [False, True]), False),
        "not in the mesh": (Sharded(part, None, [True]), False),
    }
    whole = ParameterLayout.from_tensors({k: torch.zeros(4, 3) for k in cases}, "tensor")
    held = held_locally(whole, {k: case[0] for k, case in cases.items()}, rank)
    assert held.counted == tuple(case[1] for case in cases.values())
    assert held.pieces is None
    assert [spec.shape for spec in held.local.specs] == 7 * [torch.Size((2, 3))]
    assert [spec.block for spec in held.local.specs] == list(range(7))
    assert held.local.numel == 42
    assert held.local.block_names == whole.block_names
