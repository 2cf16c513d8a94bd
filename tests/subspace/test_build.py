"""Building: tiles, devices, memory, and candidates that make no subspace."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from reference import BASES, F64, Net, candidates, check_products, expand, members
from torch import nn

from lightning_twa import SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace import Columns, ParameterLayout, build, held_everywhere, passes
from lightning_twa.subspace.candidate_tiles import CandidateTiles
from lightning_twa.subspace.directions import DenseDirections, PackedDirections


def test_subspace_in_float64_if_any_tensor_is() -> None:
    ms = [{"a": m["a.weight"].float(), "b": m["b.weight"]} for m in members()]
    subspace = build_subspace(ms)
    assert subspace.center.dtype == F64
    a, b = torch.empty(7, 5), torch.empty(3, 7, dtype=F64)
    subspace.expand(torch.zeros(subspace.num_directions, 1), [a, b])
    torch.testing.assert_close(b, torch.stack([m["b"] for m in ms]).mean(0), rtol=1e-15, atol=0)


def test_tied_parameters_count_once() -> None:
    net = Net()
    net.c = nn.Linear(5, 7, dtype=F64)
    net.c.weight = net.a.weight
    names = [name for name, _ in net.named_parameters()]
    ms = [
        {k: v + torch.randn((), dtype=F64) for k, v in net.state_dict().items()} for _ in range(3)
    ]
    subspace = build_subspace(ms, names=names)
    assert [spec.name for spec in subspace.layout.specs] == names
    SubspaceOptimizer(net.named_parameters(), subspace, total_steps=1)
    assert net.c.weight is net.a.weight


def test_device_of_the_configuration_wins_over_the_model_s() -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(device="cpu"), device="meta")
    assert subspace.center.device.type == "cpu"


@pytest.mark.parametrize("bits", [4, 32])
def test_center_and_directions_are_kept_where_the_caller_says(bits) -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits), device="meta")
    assert subspace.center.device.type == "meta"
    kept = subspace.stored.scales if bits == 4 else subspace.stored.rows
    assert kept.device.type == "meta"
    assert build_subspace(candidates()).center.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_basis_on_the_cpu_for_a_model_on_cuda() -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(bits=4, device="cpu"), device="cuda")
    assert subspace.center.device.type == "cpu"
    check_products(subspace, device="cuda")


@pytest.mark.slow
def test_peak_memory_of_building_is_packed_basis_center_and_a_few_tiles(tmp_path) -> None:
    script = tmp_path / "build.py"
    script.write_text(PEAK_SCRIPT)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    extra, held, dense = (float(v) for v in done.stdout.split())
    assert extra < held + 120e6, f"{extra / 1e6:.0f} MB for a basis of {held / 1e6:.0f} MB"
    assert extra < 0.5 * dense


PEAK_SCRIPT = """
import resource
import torch
from lightning_twa import SubspaceConfig, build_subspace

torch.set_num_threads(1)
n, d = 24, 6_000_000
# All but one candidate are expanded views of one number: hardly any memory of their own.
members = [{"w": torch.full((1,), float(i)).expand(d)} for i in range(n)]
members[0] = {"w": torch.arange(d, dtype=torch.float32)}
small = [{"w": m["w"][:300_000]} for m in members]
build_subspace(small, SubspaceConfig(bits=4))  # imports, thread pools, allocator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
subspace = build_subspace(members, SubspaceConfig(bits=4))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024.0 * (after - before), subspace.nbytes, 4.0 * n * d)
"""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_candidate_that_is_not_finite_is_named_with_its_tensor(bad) -> None:
    ms = members()
    ms[2]["a.bias"][3] = bad
    with pytest.raises(ValueError, match=r"Candidate 2, tensor 'a\.bias', holds 1 NaN or infinite"):
        build_subspace(ms)


def test_a_huge_finite_candidate_is_accepted() -> None:
    ms = [{"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), 2e38)}]
    assert bool(torch.isfinite(build_subspace(ms).center).all())


def test_candidates_that_do_not_match_are_named() -> None:
    ms = members()
    del ms[1]["scale"]
    with pytest.raises(ValueError, match="Candidate 1 has no tensor 'scale'"):
        build_subspace(ms)
    ms = members()
    ms[3]["a.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"'a\.bias' with shape \(6,\), but .* \(7,\)"):
        build_subspace(ms)
    with pytest.raises(ValueError, match="has no tensor 'c', which names asks for"):
        build_subspace(members(), names=["c"])


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two candidates, got 1"):
        build_subspace(members(1))
    ms = [{**m, "count": torch.tensor(3)} for m in members()]
    with pytest.raises(TypeError, match=r"'count' has dtype torch\.int64"):
        build_subspace(ms)
    build_subspace(ms, names=["a.bias"])
    with pytest.raises(ValueError, match="no parameter to average"):
        build_subspace([{"none": torch.zeros(0)}] * 2)


def test_mixing_of_other_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixing has shape \(1, 4, 5\), but .* 4 candidates"):
        build_subspace(members(4), mixing=build_subspace(members(5)).mixing)


def test_candidates_that_are_equal_give_a_warning() -> None:
    tensor = torch.randn(3, 4)
    for name in ("pca", "candidates"):
        with pytest.warns(UserWarning, match=r"^The 3 candidates are equal up to rounding"):
            build_subspace([{"w": tensor}] * 3, SubspaceConfig(basis=name))


def test_warnings_name_the_line_that_calls() -> None:
    with pytest.warns(UserWarning, match="equal up to rounding") as caught:
        build_subspace([{"w": torch.ones(3)}] * 3)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_subspace([{"w": torch.ones(3)}] * 3, SubspaceConfig(basis="orthonormal"))


# --- a start of its own


def test_a_start_is_the_center_and_weights_count_from_it() -> None:
    ms, start = members(5), members(1)[0]
    mean = build_subspace(ms, SubspaceConfig(blocks="tensor"))
    subspace = build_subspace(ms, SubspaceConfig(blocks="tensor"), start=start)
    assert (mean.starts_at_mean, subspace.starts_at_mean) == (True, False)
    assert torch.equal(subspace.center, torch.cat([v.reshape(-1) for v in start.values()]))
    assert torch.equal(subspace.mixing, mean.mixing)
    assert torch.equal(subspace.directions, mean.directions)
    x = torch.randn(subspace.num_directions, subspace.num_blocks, dtype=F64)
    difference = subspace.averaging_weights(x)
    torch.testing.assert_close(difference.sum(0), torch.zeros(5, dtype=F64))
    torch.testing.assert_close(difference + 0.2, mean.averaging_weights(x))
    out = expand(subspace, x)
    for spec in subspace.layout.specs:
        terms = [b * m[spec.name] for b, m in zip(difference[:, spec.block], ms, strict=True)]
        torch.testing.assert_close(out[spec.name], start[spec.name] + sum(terms))


def test_a_start_that_does_not_fit_is_refused() -> None:
    ms, start = members(5), members(1)[0]
    with pytest.raises(ValueError, match="parametrization='simplex' starts from the uniform"):
        build_subspace(ms, SubspaceConfig(parametrization="simplex"), start=start)
    start["a.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"^The start has 'a\.bias' with shape \(6,\)"):
        build_subspace(ms, start=start)


# --- passes


def test_every_pass_says_how_far_it_is() -> None:
    ms, config = members(3), SubspaceConfig(blocks="tensor")
    done: list[int] = []
    whole = build_subspace(ms, config, tick=done.append)
    tiles = [35, 7, 1, 21]  # a tile of each tensor that is not empty
    assert done == 2 * tiles
    done.clear()
    build_subspace(ms, config, mixing=whole.mixing, tick=done.append)
    assert done == tiles
    done.clear()
    build_subspace(ms, config, start=ms[0], tick=done.append)
    assert done == 2 * tiles


@pytest.mark.parametrize("small", [0, 1 << 40])
def test_every_tile_is_read_in_two_passes_and_with_a_mixing_in_one(small, monkeypatch) -> None:
    monkeypatch.setattr(build, "SMALL", small)
    read, tiles = CandidateTiles.read, []
    monkeypatch.setattr(
        CandidateTiles,
        "read",
        lambda self, tile, room: tiles.append(tile) or read(self, tile, room),
    )
    ms = [{"w": torch.randn(3, 20_000)} for _ in range(4)]
    mixing = build_subspace(ms).mixing
    assert tiles == 2 * list(range(8))
    tiles.clear()
    build_subspace(ms, mixing=mixing)
    assert tiles == list(range(8))


def test_a_mixing_gives_exactly_the_directions_again() -> None:
    ms = members(5)
    first = build_subspace(ms, SubspaceConfig(blocks="tensor"))
    again = build_subspace(ms, SubspaceConfig(blocks="tensor"), mixing=first.mixing.float())
    assert again.mixing.dtype == F64
    assert torch.equal(again.mixing, first.mixing.float().double())
    same = build_subspace(ms, SubspaceConfig(blocks="tensor"), mixing=first.mixing)
    assert torch.equal(same.directions, first.directions)
    for blocks, mixing in (("global", first.mixing), ("tensor", first.mixing[:, :, :4])):
        with pytest.raises(ValueError, match="mixing has shape"):
            build_subspace(ms, SubspaceConfig(blocks=blocks), mixing=mixing)


# --- columns of one of several processes


@BASES
def test_with_all_columns_a_process_builds_what_one_builds(name, monkeypatch) -> None:
    agreed: list[bool] = []
    monkeypatch.setattr(passes, "all_ranks", lambda value, device: agreed.append(value) or value)
    ms, config = members(5), SubspaceConfig(basis=name, blocks="tensor", bits=4)
    one = build_subspace(ms, config)
    assert not agreed, "there is nobody to agree with"
    columns = held_everywhere(one.layout, 0, 1)
    alone = build_subspace(ms, config, columns=columns)
    assert torch.equal(one.mixing, alone.mixing)
    assert torch.equal(one.directions, alone.directions)
    assert agreed == [False]


def test_sums_over_columns_are_of_those_that_are_counted(monkeypatch) -> None:
    """Two tensors, of which another process counts the second."""
    ms = [{"a": torch.randn(9, dtype=F64), "b": torch.randn(7, dtype=F64)} for _ in range(4)]
    first = build_subspace(ms, names=["a"])
    whole = build_subspace(ms)
    counted = Columns(whole.layout, whole.layout, None, (True, False))
    sums = []
    monkeypatch.setattr(passes, "sum_over_ranks", lambda t, device: sums.append(t.clone()) or t)
    found = build_subspace(ms, columns=counted)
    assert torch.equal(found.mixing, first.mixing)
    assert torch.equal(found.center, whole.center), "of all columns, counted or not"
    assert torch.equal(found.directions[:, :9], first.directions)
    b = torch.stack([m["b"] for m in ms])
    torch.testing.assert_close(found.directions[:, 9:], found.mixing[0] @ (b - b.mean(0)))
    gram, norm2, squares = sums
    a = torch.stack([m["a"] for m in ms])
    torch.testing.assert_close(gram[0], (a - a.mean(0)) @ (a - a.mean(0)).T)
    torch.testing.assert_close(norm2, a.mean(0).square().sum()[None])
    assert squares.shape == (1, 2)


def test_the_first_process_s_mixing_is_everybody_s(monkeypatch) -> None:
    """Also where another number of directions counts there."""
    ms = members(5)
    columns = held_everywhere(build_subspace(ms).layout, 0, 1)
    for k in (1, 2, 5):
        theirs = torch.zeros(1, 5, 5, dtype=F64)
        theirs[:, :k] = torch.randn(1, k, 5, dtype=F64)
        monkeypatch.setattr(build, "from_rank_zero", lambda own, device, theirs=theirs: theirs)
        assert torch.equal(build_subspace(ms, columns=columns).mixing, theirs[:, :k])


def test_of_equal_candidates_processes_too_have_one_direction_of_zeros() -> None:
    ms = [{"w": torch.ones(4)}] * 3
    columns = held_everywhere(ParameterLayout.from_tensors(ms[0]), 0, 1)
    with pytest.warns(UserWarning, match="equal up to rounding"):
        mixing = build_subspace(ms, columns=columns).mixing
    assert torch.equal(mixing, torch.zeros(1, 1, 3, dtype=F64))


def test_parts_of_sharded_tensors_are_checked_by_their_own_shapes() -> None:
    whole = ParameterLayout.from_tensors({"w": torch.zeros(6, 2)})
    local = ParameterLayout.from_tensors({"w": torch.zeros(3, 2)})
    ms = [{"w": torch.randn(3, 2)} for _ in range(3)]
    found = build_subspace(ms, columns=Columns(whole, local, None, (True,)))
    assert (found.layout, found.local_layout) == (whole, local)
    assert found.center.shape == (6,)
    with pytest.raises(ValueError, match=r"'w' with shape \(3, 2\), but .* \(6, 2\)"):
        build_subspace(ms, columns=Columns(whole, local, (slice(0, 6),), (True,)))


@pytest.mark.parametrize(
    ("bits", "kind", "dtype"),
    [
        (8, PackedDirections, None),
        (16, DenseDirections, torch.bfloat16),
        (32, DenseDirections, torch.float64),
    ],
)
def test_how_directions_are_kept(bits, kind, dtype) -> None:
    stored = build_subspace(members(3), SubspaceConfig(bits=bits)).stored
    assert type(stored) is kind
    assert dtype is None or stored.rows.dtype == dtype
