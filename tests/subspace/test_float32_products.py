"""Products in float32, as large subspaces are built with, against plain float64."""

from __future__ import annotations

import pytest
import torch
from reference import BASES, F64, SHARED_SHAPES, seeded
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.machine import full_precision, in_order
from lightning_twa.subspace import build, cut_evenly
from lightning_twa.subspace.candidate_tiles import CandidateTiles
from lightning_twa.subspace.directions import Scratch
from lightning_twa.subspace.layout import ParameterLayout

D = 41_000


@pytest.fixture(autouse=True)
def _large(monkeypatch) -> None:
    """Every subspace counts as a large one."""
    monkeypatch.setattr(build, "SMALL", 0)


def _around(spread: float, offset: float, n: int = 9) -> Tensor:
    return offset * torch.randn(D) + spread * torch.randn(n, D)


def _collinear() -> Tensor:
    line = torch.linspace(-1, 1, 9).unsqueeze(1) * torch.randn(D)
    return torch.randn(D) + line + 3e-3 * torch.randn(9, D)


KINDS = {
    "ordinary": lambda: _around(1.0, 1.0),
    "far from zero": lambda: _around(1e-3, 1e3),
    "an ulp apart": lambda: _around(1e-7, 1.0),
    "nearly on a line": _collinear,
    "tiny": lambda: _around(1e-30, 0.0),
    "huge": lambda: _around(1e30, 1e30),
    "of all magnitudes": lambda: _around(1.0, 1.0) * torch.logspace(-30, 20, D),
    "bfloat16": lambda: _around(1.0, 1.0).bfloat16(),
}
ALL = pytest.mark.parametrize("kind", KINDS)


@ALL
def test_the_gram_matrix_is_within_a_millionth_of_the_norms(kind) -> None:
    rows = KINDS[kind]()
    members = [{"w": row} for row in rows]
    layout = ParameterLayout.from_tensors(members[0])
    tiles = CandidateTiles(layout, members, None, centered=True, narrow=True)
    found, dtypes, scratch = torch.zeros(9, 9, dtype=F64), set(), Scratch()
    for tile in range(len(tiles)):
        read = tiles.read(tile, scratch)
        dtypes.add(read.rows.dtype)
        found += tiles.gram(tile, read.rows, scratch)
    exact = rows.double() - rows.double().mean(0)
    expected = exact @ exact.T
    norms = expected.diagonal().sqrt()
    assert float(((found - expected).abs() / norms.outer(norms)).max()) < 1e-6
    narrow = {torch.float64} if kind in ("tiny", "huge") else {torch.float32}
    assert dtypes == narrow | ({torch.float64} if kind == "of all magnitudes" else set())


def members_of(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"w": row[: D - 77].view(3, -1), "v": row[D - 77 :]} for row in rows]


@ALL
@pytest.mark.parametrize("name", ["pca", "candidates"])
def test_directions_and_center_are_those_of_float64(kind, name, monkeypatch) -> None:
    rows, config = KINDS[kind](), SubspaceConfig(basis=name)
    found = build_subspace(members_of(rows), config)
    monkeypatch.setattr(build, "SMALL", 1 << 60)
    exact = build_subspace(members_of(rows), config)
    assert torch.equal(found.center, exact.center)
    assert found.num_directions == exact.num_directions
    scale = exact.directions.double().abs().max()
    u, v = (s.directions.double() / scale for s in (found, exact))
    # What the basis spans and how it is scaled: principal directions of like size may be turned
    # among each other.
    probe = torch.randn(D, dtype=F64)
    expected = v.T @ (v @ probe)
    assert float((u.T @ (u @ probe) - expected).norm() / expected.norm()) < 2e-5
    mixed = found.mixing[0] @ (rows.double() - rows.double().mean(0)) / scale
    assert float((u - mixed).norm() / mixed.norm()) < 1e-6


@ALL
def test_every_candidate_is_in_the_span(kind) -> None:
    rows = KINDS[kind]()
    subspace = build_subspace(members_of(rows), SubspaceConfig(basis="candidates"))
    theta = [torch.empty(s.shape, dtype=F64) for s in subspace.layout.specs]
    for i, row in enumerate(rows):
        norm = (row.double() - rows.double().mean(0)).norm()
        x = torch.zeros(9, 1, dtype=F64)
        x[i] = norm
        subspace.expand(x, theta)
        flat = torch.cat([t.reshape(-1) for t in theta])
        assert float((flat - row.double()).norm()) < 1e-6 * (float(norm) + float(row.norm()))


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_the_number_of_threads_does_not_matter(bits, blocks) -> None:
    states, found = [seeded(i) for i in range(6)], []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(build_subspace(states, SubspaceConfig(bits=bits, blocks=blocks)))
        assert torch.get_num_threads() == threads
    one, *others = found
    for other in others:
        assert torch.equal(one.mixing, other.mixing)
        assert torch.equal(one.center, other.center)
        assert torch.equal(one.directions, other.directions)
        assert one.stored.error == other.stored.error


@BASES
@pytest.mark.parametrize("bits", [3, 32])
def test_shards_hold_what_one_process_holds_of_their_columns(bits, name) -> None:
    states, config = [seeded(i) for i in range(5)], SubspaceConfig(bits=bits, basis=name)
    one = build_subspace(states, config)
    parts = [
        build_subspace(states, config, columns=columns, mixing=one.mixing)
        for columns in cut_evenly(one.layout, 3)
    ]
    for i, spec in enumerate(one.layout.specs):
        pieces = []
        for part in parts:
            local = part.local_layout.specs[i]
            pieces.append(part.directions[:, local.start : local.stop])
        assert torch.equal(torch.cat(pieces, dim=1), one.directions[:, spec.start : spec.stop])


def test_what_is_equal_in_all_candidates_has_no_extent() -> None:
    states = [seeded(i) for i in range(7)]
    for state in states:
        state["a"] = states[0]["a"]
        state["large"][::2] = states[0]["large"][::2]
    for config in (SubspaceConfig(), SubspaceConfig(bits=4), SubspaceConfig(blocks="tensor")):
        subspace = build_subspace(states, config)
        specs = {spec.name: slice(spec.start, spec.stop) for spec in subspace.layout.specs}
        assert not subspace.directions[:, specs["a"]].any()
        assert not subspace.directions[:, specs["large"]].view(-1, 150, 121)[:, ::2].any()
        assert torch.equal(subspace.center[specs["a"]], states[0]["a"].reshape(-1))


def test_candidates_that_are_not_contiguous_and_of_other_dtypes() -> None:
    shapes = {name: shape for name, shape in SHARED_SHAPES.items() if len(shape) == 2}
    states = [seeded(i, shapes) for i in range(4)]
    states[1] = {k: v.bfloat16().float() for k, v in states[1].items()}
    plain = build_subspace(states)
    other = [{k: v.T.contiguous().T for k, v in state.items()} for state in states]
    other[1] = {k: v.bfloat16() for k, v in other[1].items()}
    found = build_subspace(other)
    assert torch.equal(found.directions, plain.directions)
    assert torch.equal(found.center, plain.center)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(bad, threads) -> None:
    torch.set_num_threads(threads)
    states = [seeded(i) for i in range(4)]
    states[2]["large"][140, 3] = bad
    with pytest.raises(ValueError, match="Candidate 2, tensor 'large', holds 1 NaN or infinite"):
        build_subspace(states)
    assert torch.get_num_threads() == threads


# --- products have the precision of float32


def test_autocast_does_not_reach_the_products() -> None:
    states = [seeded(i) for i in range(4)]
    plain = build_subspace(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(build_subspace(states).directions, plain.directions)


def test_a_precision_that_is_allowed_elsewhere_is_set_back() -> None:
    states, before = [seeded(i) for i in range(4)], torch.get_float32_matmul_precision()
    plain = build_subspace(states)
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with full_precision():
                pass
            assert torch.equal(build_subspace(states).directions, plain.directions)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# --- work over threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_come_in_the_order_of_their_jobs_with_memory_of_their_own(threads) -> None:
    rooms: list[list[int]] = []

    def make() -> list[int]:
        rooms.append([])
        return rooms[-1]

    def work(job: int, room: list[int]) -> int:
        assert not room, "somebody else's"
        room.append(job)
        torch.randn(2000 // (job + 1)).sum()
        room.clear()
        return job * job

    assert list(in_order(work, range(40), make, threads)) == [i * i for i in range(40)]
    assert len(rooms) == threads


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_given_back_when_nobody_takes_the_rest(threads) -> None:
    torch.set_num_threads(2)
    results = in_order(lambda job, room: torch.get_num_threads(), range(9), list, threads)
    assert next(results) == 1
    results.close()
    assert torch.get_num_threads() == 2
