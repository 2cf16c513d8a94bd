"""Building: tiles, devices, memory, and candidates that make no subspace."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from reference import BASES, BLOCKS, F64, Net, candidates, check_products, members
from torch import nn

from lightning_twa import SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace import build


@BASES
@BLOCKS
def test_tiles_do_not_matter(name, blocks, monkeypatch) -> None:
    ms, config = members(), SubspaceConfig(basis=name, blocks=blocks)
    whole = build_subspace(ms, config)
    monkeypatch.setattr(build, "TILE_COLUMNS", 4)
    tiled = build_subspace(ms, config)
    torch.testing.assert_close(whole.directions, tiled.directions, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(whole.center, tiled.center, rtol=1e-14, atol=0)


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
