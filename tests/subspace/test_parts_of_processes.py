"""Processes with the same candidates build a part of the basis each, and have what one process has,
bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import seeded

from helpers.processes import run
from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.machine import CommonError, threads_here
from lightning_twa.subspace import ParameterLayout, build, held_everywhere
from lightning_twa.subspace.candidate_tiles import CandidateTiles

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
]


def members(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """A third of one tensor is the same in all."""
    states = [{k: v.to(dtype) for k, v in seeded(i).items()} for i in range(5)]
    for state in states:
        state["a"][::3] = states[0]["a"][::3]
    return states


def what(config: SubspaceConfig, dtype: torch.dtype, columns: Any, start: bool) -> dict[str, Any]:
    states = members(dtype)
    origin = states[1] if start else None
    subspace = build_subspace(states, config, columns=columns, start=origin)
    again = build_subspace(states, config, columns=columns, mixing=subspace.mixing, start=origin)
    assert torch.equal(again.directions, subspace.directions)
    assert torch.equal(again.center, subspace.center)
    return {
        "mixing": subspace.mixing,
        "center": subspace.center,
        "directions": subspace.directions,
        "error": subspace.stored.error,
        "bytes": subspace.nbytes,
    }


def built(folder: Path, config: SubspaceConfig, dtype: torch.dtype, start: bool) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    read, tiles = CandidateTiles.read, []
    CandidateTiles.read = lambda s, tile, room: tiles.append(tile) or read(s, tile, room)  # type: ignore[method-assign,func-returns-value]
    layout = ParameterLayout.from_tensors(members(dtype)[0], config.blocks)
    found = what(config, dtype, held_everywhere(layout, rank, size), start)
    torch.save((found, tiles), folder / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    ("config", "dtype", "start", "small"),
    [
        (SubspaceConfig(), torch.float32, False, 0),
        (SubspaceConfig(bits=3, blocks=2000), torch.float32, True, 0),
        (SubspaceConfig(bits=16, basis="candidates"), torch.float32, False, 1 << 40),
        (SubspaceConfig(bits=4, basis="orthonormal"), torch.float64, False, 0),
    ],
)
def test_every_process_has_what_one_has(
    tmp_path, processes, config, dtype, start, small, monkeypatch
) -> None:
    monkeypatch.setattr(build, "SMALL", small)
    one = what(config, dtype, None, start)
    run(built, processes, tmp_path, config, dtype, start)
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for found, _ in every:
        assert all(torch.equal(found[k], one[k]) for k in ("mixing", "center", "directions"))
        assert (found["error"], found["bytes"]) == (one["error"], one["bytes"])
    read = [tile for _, tiles in every for tile in tiles]
    columns = CandidateTiles(
        ParameterLayout.from_tensors(members(dtype)[0], config.blocks),
        members(dtype),
        None,
        centered=True,
        narrow=False,
    )
    assert sorted(read) == sorted(3 * list(range(len(columns)))), "each tile by one of them"


def refused(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    states = members(torch.float32)
    states[3]["large"][0, 0] = torch.nan  # a tile of which only one process reads
    columns = held_everywhere(ParameterLayout.from_tensors(states[0]), rank, size)
    with pytest.raises(CommonError, match="Candidate 3, tensor 'large', holds 1 NaN"):
        build_subspace(states, columns=columns)
    torch.set_num_threads(64)
    (folder / f"{rank}").write_text(str(threads_here()))


def test_what_one_process_finds_is_refused_by_all_and_cores_are_shared(tmp_path) -> None:
    run(refused, 2, tmp_path)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == 2 * [str(share)]


def test_who_builds_alone_asks_no_other_process(monkeypatch) -> None:
    """Others of its group may build nothing, and would not answer."""
    monkeypatch.setattr(build, "threads_here", lambda: pytest.fail("asks the others"))
    monkeypatch.setattr(build, "SMALL", 0)
    first, second = {"w": torch.zeros(300)}, {"w": torch.ones(300)}
    assert build_subspace([first, second]).num_directions == 1
