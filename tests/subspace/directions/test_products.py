"""What holds at every width: products against float64 products with what is stored."""

from __future__ import annotations

import pytest
import torch
from reference import candidates, check_products, use

from lightning_twa import SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace.directions import TILE

ALL_BITS = (*range(1, 9), 16, 32)


@pytest.mark.matrix(36)
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


@pytest.mark.parametrize("bits", [1, 4, 5, 16, 32])
def test_building_and_products_are_deterministic(bits) -> None:
    members = candidates()
    first, second = (
        build_subspace(members, SubspaceConfig(bits=bits, blocks="tensor")) for _ in range(2)
    )
    assert torch.equal(first.directions, second.directions)
    gradients = [torch.randn(spec.shape) for spec in first.layout.specs]
    assert torch.equal(first.project(gradients), second.project(gradients))


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
