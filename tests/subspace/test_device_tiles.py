"""Building on a device: one that is simulated, the CPU in its place, and a real one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from reference import BASES, F32, F64, SHAPES, candidates, check_products, seeded

from helpers.simulated import DEVICE, Race, Simulated, There
from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace import (
    Columns,
    ParameterLayout,
    Subspace,
    held_everywhere,
    passes,
)
from lightning_twa.subspace.device_tiles import DeviceTiles
from lightning_twa.subspace.directions import TILE, PackedDirections
from lightning_twa.subspace.directions.padding import fill_group

BITS = [32, 16, 8, 4, 3, 1]
BLOCKS = ["global", "tensor", 30]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on subspaces on the CPU are built as on a device, so many tiles at a time."""

    def begin(width: int | None = None) -> None:
        monkeypatch.setattr(passes, "BUILDS", {"cpu"})
        monkeypatch.setattr(passes, "DeviceTiles", partial(DeviceTiles, width=width))

    return begin


def check_same(found: Subspace, host: Subspace, *, rtol: float = 1e-6) -> None:
    """Two builds of the same candidates."""
    assert found.layout == host.layout
    assert torch.equal(found.center, host.center)
    torch.testing.assert_close(found.mixing, host.mixing, rtol=1e-9, atol=1e-9)
    limit = rtol if found.config.bits >= 16 else 2e-2  # of codes on the edge of two levels
    off = float((found.directions - host.directions).norm() / host.directions.norm())
    assert off < limit
    assert found.stored.error == pytest.approx(host.stored.error, rel=1e-3, abs=1e-9)
    assert found.stored.nbytes == host.stored.nbytes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("width", [1, 3, None])
def test_directions_are_the_float64_reference(on_device, bits, blocks, width) -> None:
    states, config = candidates(), SubspaceConfig(bits=bits, blocks=blocks)
    host = build_subspace(states, config)
    on_device(width)
    found = build_subspace(states, config)
    check_same(found, host)
    check_products(found)


@BASES
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
@pytest.mark.parametrize("start", [False, True])
def test_bases_dtypes_and_starts(on_device, name, dtype, start) -> None:
    states = candidates(dtype=dtype)
    given = {k: v + 0.1 for k, v in states[0].items()} if start else None
    build = partial(build_subspace, states, SubspaceConfig(basis=name), start=given)
    host = build()
    on_device(2)
    found = build()
    assert torch.equal(found.center, host.center)
    torch.testing.assert_close(found.directions, host.directions, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(build(mixing=host.mixing).directions, host.directions)


def test_columns_with_one_value_stay_there(on_device) -> None:
    """Whatever the rounding of the mean, and though codes have no zero."""
    on_device(2)
    fixed = torch.randn(3 * TILE)
    states = [{"fixed": fixed, "w": torch.randn(TILE + 5)} for _ in range(7)]
    for dtype in (F32, F64):
        for bits in (32, 4):
            cast = [{k: v.to(dtype) for k, v in state.items()} for state in states]
            found = build_subspace(cast, SubspaceConfig(bits=bits))
            assert bool((found.directions[:, : len(fixed)] == 0).all())
            assert bool((found.directions[:, len(fixed) :] != 0).any())
            assert torch.equal(found.center[: len(fixed)], fixed.to(dtype))


def test_without_columns_that_lie_still_there_is_no_mask_of_them(on_device) -> None:
    on_device()
    assert build_subspace(candidates(), SubspaceConfig(bits=4)).stored._still is None


@pytest.mark.parametrize("stop", [1, 5, 127, 130, 200, TILE - 1])
def test_padding_is_that_of_the_host(on_device, stop) -> None:
    """Copies of the entries of the group, so that the codes are the same."""
    states = [{"w": torch.randn(stop), "v": torch.randn(3)} for _ in range(4)]
    host = build_subspace(states, SubspaceConfig(bits=4))
    on_device()
    found = build_subspace(states, SubspaceConfig(bits=4))
    torch.testing.assert_close(found.directions, host.directions, rtol=1e-5, atol=1e-6)
    values = torch.randn(2, 256)
    if stop < 256 and stop % 128:
        fill_group(values, stop)
        first = stop // 128 * 128
        assert torch.equal(values[:, stop], values[:, first])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mixing", [False, True])
def test_what_is_not_finite_is_named(on_device, bad, mixing) -> None:
    states = candidates()
    known = build_subspace(states, SubspaceConfig(bits=4)).mixing if mixing else None
    on_device(1)
    states[2]["large"][100, 3] = bad
    with pytest.raises(ValueError, match="Candidate 2, tensor 'large', holds 1 NaN"):
        build_subspace(states, SubspaceConfig(bits=4), mixing=known)


def test_a_huge_finite_candidate_is_accepted(on_device) -> None:
    on_device()
    states = [{"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), 2e38)}]
    assert bool(torch.isfinite(build_subspace(states).center).all())


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("method", ["moments", "fill"])
def test_a_device_without_room_leaves_it_to_the_host(on_device, monkeypatch, method, after) -> None:
    states, config = candidates(), SubspaceConfig(bits=4, blocks="tensor")
    host = build_subspace(states, config)
    on_device(1)
    plain, calls = DeviceTiles._rows, []

    def full(self: Any, tiles: range, staging: Any) -> Any:
        calls.append(tiles)
        if len(calls) > after + (len(self.own) if method == "fill" else 0):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return plain(self, tiles, staging)

    monkeypatch.setattr(DeviceTiles, "_rows", full)
    found = build_subspace(states, config)
    if method == "moments":
        assert torch.equal(found.mixing, host.mixing)
        assert torch.equal(found.directions, host.directions)
    check_same(found, host)
    assert len(calls) == after + 1 + (len(found.stored.scales) if method == "fill" else 0)


def test_what_a_device_cannot_do_the_host_does(on_device, monkeypatch) -> None:
    states, config = candidates(), SubspaceConfig(bits=4)
    host = build_subspace(states, config)
    on_device(1)

    def fails(*args: Any) -> Any:
        raise RuntimeError("no deterministic implementation")

    monkeypatch.setattr(DeviceTiles, "_norms", fails)
    with pytest.warns(UserWarning, match=r"built on cpu \(no deterministic.*on the CPU") as caught:
        found = build_subspace(states, config)
    assert len(caught) == 1
    assert torch.equal(found.directions, host.directions)


def test_every_stretch_is_told(on_device) -> None:
    on_device(2)
    told: list[int] = []
    states = candidates()
    subspace = build_subspace(states, tick=told.append)
    assert sum(told) == 2 * subspace.layout.numel
    told.clear()
    build_subspace(states, tick=told.append, mixing=subspace.mixing)
    assert sum(told) == subspace.layout.numel


def test_of_what_several_processes_hold_one_counts(on_device, monkeypatch) -> None:
    states = candidates()
    whole = ParameterLayout.from_tensors(states[0])
    counted = tuple(i % 2 == 0 for i in range(len(SHAPES)))
    columns = Columns(whole, whole, None, counted)
    sums: list[Any] = []
    monkeypatch.setattr(passes, "sum_over_ranks", lambda t, device: sums.append(t.clone()) or t)
    for start in (None, states[1]):
        build_subspace(states, columns=columns, start=start)
        host = sums.copy()
        sums.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "BUILDS", {"cpu"})
            build_subspace(states, columns=columns, start=start)
        for mine, its in zip(sums, host, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)
        sums.clear()


def test_memory_that_a_device_works_in_is_bounded(on_device) -> None:
    """Whatever the number of columns."""
    sizes = []
    for columns in (4 * TILE, 40 * TILE):
        states = [{"w": torch.randn(columns)} for _ in range(3)]
        tiles = passes.CandidateTiles(
            ParameterLayout.from_tensors(states[0]), states, None, centered=True, narrow=False
        )
        device = DeviceTiles(tiles, torch.device("cpu"), [range(len(tiles))], width=2)
        for _ in device._read():
            pass
        sizes.append(sum(t.numel() for t in device.scratch._held.values()))
    assert sizes[0] == sizes[1]


# --- a simulated device


@pytest.mark.parametrize("bits", [32, 16, 4, 1])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
@pytest.mark.parametrize("there", [False, True])
def test_a_device_has_all_of_it_and_the_host_waits_for_memory_only(bits, blocks, there) -> None:
    states, config = candidates(), SubspaceConfig(bits=bits, blocks=blocks)
    host = build_subspace(states, config)
    with Simulated() as device:
        if there:
            states = [{k: v.to(DEVICE) for k, v in state.items()} for state in states]
            device.waits = device.events = 0
        found = build_subspace(states, config, device=DEVICE)
        waits = device.waits - device.events  # events are of memory that is used again
        kept = found.stored.rows if bits >= 16 else found.stored.scales
        assert isinstance(found.center, There)
        assert isinstance(kept, There)
        assert torch.equal(found.center.cpu(), host.center)
        directions = found.directions.cpu()
    limit = 1e-6 if bits >= 16 else 2e-2
    assert float((directions - host.directions).norm() / host.directions.norm()) < limit
    if not there:
        assert waits <= 7, "mixing, results of two passes, and whether columns lie still"


@pytest.mark.parametrize(("bits", "limit"), [(32, 70), (16, 70), (8, 170), (4, 170), (1, 140)])
@pytest.mark.parametrize("n", [3, 9])
def test_operations_of_a_stretch(monkeypatch, bits, limit, n) -> None:
    """Both passes; the host launches each of them. A tile more costs the three sums of it."""
    monkeypatch.setattr(passes, "PARTS", 1)
    found = []
    for width in (1, 3):
        done = []
        for stretches in (2, 12):
            states = candidates(n, shapes={"w": (width * stretches * TILE,)})
            with pytest.MonkeyPatch.context() as patch, Simulated() as device:
                patch.setattr(passes, "DeviceTiles", partial(DeviceTiles, width=width))
                build_subspace(states, SubspaceConfig(bits=bits), device=DEVICE)
                done.append(device.done)
        found.append((done[1] - done[0]) / 10)
    assert found[0] <= limit
    dense = bits >= 16  # a copy of each tile, and its mean
    assert found[1] - found[0] <= 2 * (5 if dense else 4)


@pytest.mark.parametrize("width", [1, 2, 5, 100])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_sums_are_the_same_for_any_number_of_processes_and_any_room(
    on_device, monkeypatch, width, processes
) -> None:
    states = candidates(4, shapes={"a": (150, 1000), "b": (37,), "c": (900, 1000)})
    layout = ParameterLayout.from_tensors(states[0])
    on_device(3)
    whole = build_subspace(states, SubspaceConfig(basis="candidates"))
    on_device(width)
    sums: list[Any] = []
    monkeypatch.setattr(passes, "world_size", lambda: processes)
    monkeypatch.setattr(passes, "sum_over_ranks", lambda t, device: sums.append(t.clone()) or t)
    monkeypatch.setattr(passes, "from_rank_", lambda *args: None)
    for rank in range(processes):
        monkeypatch.setattr(passes, "rank", lambda rank=rank: rank)
        columns = held_everywhere(layout, rank, processes)
        build_subspace(states, SubspaceConfig(basis="candidates"), columns=columns)
    grams = torch.stack([t for t in sums if t.dim() == 3]).sum(dim=0)
    alone: list[Any] = []
    monkeypatch.setattr(passes, "world_size", lambda: 1)
    monkeypatch.setattr(passes, "rank", lambda: 0)
    monkeypatch.setattr(passes, "sum_over_ranks", lambda t, device: alone.append(t.clone()) or t)
    on_device(7)
    columns = held_everywhere(layout, 0, 1)
    found = build_subspace(states, SubspaceConfig(basis="candidates"), columns=columns)
    assert torch.equal(found.directions, whole.directions)
    total = torch.zeros_like(alone[0][0])
    for part in grams:
        total += part
    assert torch.equal(total, alone[0][0])


def test_candidates_in_a_wider_dtype_than_the_first_are_left_to_the_host(on_device) -> None:
    states = [{"w": torch.ones(3)}, {"w": torch.full((3,), 1 + 1e-9, dtype=F64)}]
    host = build_subspace(states)
    on_device()
    assert torch.equal(build_subspace(states).directions, host.directions)
    assert bool((host.directions != 0).any())


@pytest.mark.parametrize("bits", [32, 4])
def test_with_a_start_there_is_no_mean(on_device, monkeypatch, bits) -> None:
    states, seen = candidates(), []
    plain = DeviceTiles.fill

    def fill(self: Any, *args: Any) -> Any:
        seen.append(args[-1])
        return plain(self, *args)

    monkeypatch.setattr(DeviceTiles, "fill", fill)
    on_device()
    found = build_subspace(states, SubspaceConfig(bits=bits), start=states[1])
    assert seen == [None]
    flat = torch.cat([t.reshape(-1) for t in states[1].values()])
    assert torch.equal(found.center, flat)


@pytest.mark.parametrize("waits", [True, False])
def test_staging_memory_is_used_again_when_the_device_has_taken_it(monkeypatch, waits) -> None:
    states = candidates()
    with pytest.MonkeyPatch.context() as patch, Simulated():
        patch.setattr(passes, "DeviceTiles", partial(DeviceTiles, width=1))
        if not waits:
            patch.setattr(torch.cuda.Event, "synchronize", lambda self: None)
            with pytest.raises(Race, match="used again"):
                build_subspace(states, device=DEVICE)
        else:
            build_subspace(states, device=DEVICE)


# --- a real one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_gpu_builds_what_the_host_builds(bits, blocks) -> None:
    states, config = candidates(), SubspaceConfig(bits=bits, blocks=blocks)
    host = build_subspace(states, config)
    found = build_subspace(states, config, device="cuda")
    off = float((found.directions.cpu() - host.directions).norm() / host.directions.norm())
    assert off < (1e-6 if bits >= 16 else 2e-2)
    assert torch.equal(found.center.cpu(), host.center)
    again = build_subspace(states, config, device="cuda")
    assert torch.equal(found.directions, again.directions)
    check_products(found, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_between_stretches() -> None:
    states = [seeded(i) for i in range(5)]
    columns = ParameterLayout.from_tensors(states[0])
    tiles = passes.CandidateTiles(columns, states, None, centered=True, narrow=False)
    there = DeviceTiles(tiles, torch.device("cuda"), [range(len(tiles))], width=1)
    into = PackedDirections(columns, 3, 4, torch.device("cuda"))
    stretches = there._read()
    next(stretches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(len(tiles) - 2):
            stretch = next(stretches)
            values = stretch.rows[:, :3].contiguous()
            into.write_tiles(stretch.tiles.start, values, there.scratch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
