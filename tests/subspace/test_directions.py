"""Products with stored directions, on every path, against float64 products with what is stored."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_twa import Subspace, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace.directions import TILE, PackedDirections, kernels
from lightning_twa.subspace.directions import packed as module

ALL_BITS = (*range(1, 9), 16, 32)
# Blocks that are not multiples of a tile or group, smaller than both, empty, and of no dimension.
SHAPES = {
    "a": (300, 70),
    "b": (5,),
    "scalar": (),
    "empty": (0, 3),
    "conv": (64, 3, 3, 3),
    "large": (130, 100),
}


def candidates(n: int = 6, dtype: torch.dtype = torch.float32, shapes: Any = None) -> list[Any]:
    shapes = SHAPES if shapes is None else shapes
    return [{k: torch.randn(s, dtype=dtype) for k, s in shapes.items()} for _ in range(n)]


def use(subspace: Subspace, path: str) -> Subspace:
    assert isinstance(subspace.stored, PackedDirections)
    subspace.stored._path = path
    return subspace


def check_products(subspace: Subspace, device: str = "cpu", rtol: float = 1e-5) -> None:
    """``project`` and ``expand`` against float64 products with the stored directions."""
    layout = subspace.layout
    u = subspace.directions.double().cpu()
    block = torch.cat([torch.full((s.stop - s.start,), s.block) for s in layout.specs]).long()
    dtype = torch.float64 if layout.dtype == torch.float64 else torch.float32
    gradients = [torch.randn(s.shape, dtype=dtype, device=device) for s in layout.specs]
    g = torch.cat([t.cpu().double().reshape(-1) for t in gradients])
    expected = torch.stack(
        [u[:, block == b] @ g[block == b] for b in range(layout.num_blocks)], dim=1
    )
    found = subspace.project(gradients)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < rtol

    x = torch.randn_like(expected)
    out = [torch.full(s.shape, torch.nan, dtype=dtype, device=device) for s in layout.specs]
    subspace.expand(x, out)
    theta = subspace.center.cpu().double() + (u * x[:, block]).sum(0)
    flat = torch.cat([t.cpu().double().reshape(-1) for t in out])
    assert float((flat - theta).norm() / theta.norm()) < rtol


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("blocks", ["global", "tensor", 500])
@pytest.mark.parametrize("basis", ["pca", "candidates", "orthonormal"])
def test_products_equal_the_float64_reference(bits, blocks, basis) -> None:
    config = SubspaceConfig(bits=bits, blocks=blocks, basis=basis)
    check_products(build_subspace(candidates(), config))


@pytest.mark.parametrize("bits", [1, 4, 5, 16, 32])
def test_products_in_float64_are_as_exact_as_float64(bits) -> None:
    check_products(
        build_subspace(candidates(dtype=torch.float64), SubspaceConfig(bits=bits)), rtol=1e-13
    )


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n", [2, 3])
def test_one_and_two_directions(bits, n) -> None:
    subspace = build_subspace(candidates(n), SubspaceConfig(bits=bits))
    assert subspace.num_directions == n - 1
    check_products(subspace)


@pytest.mark.parametrize("numel", [1, 127, 129, TILE - 1, TILE, TILE + 1, 3 * TILE + 77])
def test_sizes_around_group_and_tile(numel) -> None:
    check_products(build_subspace(candidates(shapes={"w": (numel,)}), SubspaceConfig(bits=4)))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_that_do_not_divide_the_tiles(chunk, monkeypatch) -> None:
    monkeypatch.setitem(module.CHUNK_TILES, "cpu", chunk)
    for blocks in ("global", "tensor"):
        check_products(build_subspace(candidates(), SubspaceConfig(bits=4, blocks=blocks)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_compiled_products_equal_the_float64_reference(bits) -> None:
    torch._dynamo.reset()
    subspace = use(build_subspace(candidates(), SubspaceConfig(bits=bits)), "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        check_products(subspace)
    assert subspace.stored.path == "compiled", "compiling failed and the test saw the fallback"


def test_failed_compilation_falls_back_with_one_warning(monkeypatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(kernels, "compiled_kernels", lambda: (broken, broken))
    subspace = use(build_subspace(candidates(), SubspaceConfig(bits=4)), "compiled")
    with pytest.warns(UserWarning, match="could not be compiled.*no C\\+\\+ compiler") as caught:
        check_products(subspace)
    assert len(caught) == 1
    assert subspace.stored.path == "tiled"


def test_tiled_products_leave_the_number_of_threads() -> None:
    torch.set_num_threads(2)
    check_products(build_subspace(candidates(), SubspaceConfig(bits=4)))
    assert torch.get_num_threads() == 2


def test_large_bases_are_compiled_and_small_ones_are_not(monkeypatch) -> None:
    assert build_subspace(candidates(), SubspaceConfig(bits=4)).stored.path == "tiled"
    monkeypatch.setattr(module, "COMPILE_ENTRIES", 1000)
    assert build_subspace(candidates(), SubspaceConfig(bits=4)).stored.path == "compiled"


@pytest.mark.parametrize("bits", ALL_BITS)
def test_center_is_exact_at_any_width(bits) -> None:
    members = candidates()
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    out = [torch.empty(spec.shape) for spec in subspace.layout.specs]
    subspace.expand(torch.zeros(subspace.num_directions, 1), out)
    for spec, tensor in zip(subspace.layout.specs, out, strict=True):
        mean = torch.stack([m[spec.name].double() for m in members]).mean(0)
        assert torch.equal(tensor, mean.float())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_measured_error_and_bytes_are_those_of_what_is_stored(bits) -> None:
    members = candidates(shapes={"w": (4 * TILE,), "v": (TILE // 2,)})
    exact = build_subspace([{k: v.double() for k, v in m.items()} for m in members]).directions
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    error = float((subspace.directions.double() - exact).norm() / exact.norm())
    assert subspace.stored.error == pytest.approx(error, rel=1e-3)
    if bits <= 8:
        entries = subspace.num_directions * 5 * TILE  # the last half tile is padded
        assert subspace.stored.nbytes == entries * bits // 8 + entries // 128 * 2
        assert f"bits={bits}" in repr(subspace)
        assert f"relative_error={error:.2g}"[:-1] in repr(subspace)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_averaging_weights_hold_up_to_the_measured_error(bits) -> None:
    members = candidates()
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    x = torch.randn(subspace.num_directions, 1, dtype=torch.float64)
    beta = subspace.averaging_weights(x)
    out = [torch.empty(spec.shape) for spec in subspace.layout.specs]
    subspace.expand(x, out)
    theta = torch.cat([t.double().reshape(-1) for t in out])
    flat = [torch.cat([t.double().reshape(-1) for t in m.values()]) for m in members]
    mixed = sum(b * w for b, w in zip(beta[:, 0], flat, strict=True))
    moved = mixed - subspace.center.double()
    assert float((theta - mixed).norm() / moved.norm()) < 1.3 * subspace.stored.error


def test_tensors_of_different_magnitude_do_not_share_a_scale() -> None:
    shapes = {"small": (100,), "large": (100,)}
    members = candidates(shapes=shapes)
    for member in members:
        member["small"] *= 1e-6
    subspace = build_subspace(members, SubspaceConfig(bits=4))
    exact = build_subspace(members).directions[:, :100]
    stored = subspace.directions[:, :100]
    assert float((stored - exact).norm() / exact.norm()) < 0.11


def test_parameters_that_cannot_be_written_flat() -> None:
    members = [{"w": torch.randn(8, 4, 3, 3), "v": torch.randn(6, 5)} for _ in range(4)]
    for bits in (4, 16, 32):
        subspace = build_subspace(members, SubspaceConfig(bits=bits))
        x = torch.randn(3, 1)
        plain = [torch.empty(8, 4, 3, 3), torch.empty(6, 5)]
        other = [
            torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last),
            torch.empty(5, 6, dtype=torch.bfloat16).T,
        ]
        subspace.expand(x, plain)
        subspace.expand(x, other)
        assert torch.equal(plain[0], other[0])
        assert torch.equal(plain[1].bfloat16(), other[1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_phase_on_few_bits_lowers_the_loss_inside_what_is_stored(bits) -> None:
    target = torch.randn(50)
    members = [{"w": target + torch.randn(50)} for _ in range(12)]
    w = torch.nn.Parameter(torch.empty(50))
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    optimizer = SubspaceOptimizer([("w", w)], subspace, total_steps=50)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (w - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    span = subspace.directions.double().T
    delta = (w.detach() - subspace.center).double()
    rest = delta - span @ torch.linalg.lstsq(span, delta, driver="gelsd").solution
    assert float(rest.norm() / w.detach().norm()) < 1e-5


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


STEP_SCRIPT = """
import resource, sys
import torch
from lightning_twa.subspace.directions import DenseDirections, PackedDirections
from lightning_twa.subspace.layout import ParameterLayout

torch.set_num_threads(1)
bits, path = int(sys.argv[1]), sys.argv[2]
k = 16

def run(size, count):
    weights = {f"w{i}": torch.ones(size) for i in range(count)}
    gradients = [torch.ones(size) for _ in range(count)]
    layout = ParameterLayout.from_tensors(weights)
    center = torch.ones(layout.numel)
    cpu = torch.device("cpu")
    if bits == 32:
        stored = DenseDirections(layout, k, torch.float32, cpu)
        stored.rows.fill_(1.0)
    else:
        stored = PackedDirections(layout, k, bits, cpu, path=path)
        for plane in stored.planes:
            plane.fill_(3)
        stored.scales.fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = stored.project(gradients)
    stored.expand(x, center, list(weights.values()))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

run(300_000, 2)  # imports, compiling: the chunk of tiles is the same
print(run(1_000_000, 12), 4 * 12_000_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "path"), [(1, "tiled"), (4, "compiled")])
def test_a_step_needs_less_than_one_vector_of_the_model_s_length(bits, path, tmp_path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, str(bits), path], capture_output=True, text=True, check=True
    )
    extra, vector = map(int, done.stdout.split())
    assert extra < 0.5 * vector, f"{extra / 1e6:.1f} MB beside vectors of {vector / 1e6:.1f} MB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("path", ["tiled", "compiled"])
def test_products_on_cuda_equal_the_float64_reference(bits, path) -> None:
    torch._dynamo.reset()
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits), device="cuda")
    if bits <= 8:
        use(subspace, path)
    check_products(subspace, device="cuda")
    if bits <= 8:
        assert subspace.stored.path == path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_basis_on_the_cpu_for_a_model_on_cuda() -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(bits=4, device="cpu"), device="cuda")
    assert subspace.center.device.type == "cpu"
    check_products(subspace, device="cuda")


def test_device_of_the_configuration_wins_over_the_model_s() -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(device="cpu"), device="meta")
    assert subspace.center.device.type == "cpu"


@pytest.mark.parametrize("bits", [1, 4, 5, 16, 32])
def test_building_and_products_are_deterministic(bits) -> None:
    members = candidates()
    first, second = (
        build_subspace(members, SubspaceConfig(bits=bits, blocks="tensor")) for _ in range(2)
    )
    assert torch.equal(first.directions, second.directions)
    gradients = [torch.randn(spec.shape) for spec in first.layout.specs]
    assert torch.equal(first.project(gradients), second.project(gradients))
