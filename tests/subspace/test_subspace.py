"""Gradients in the coefficients, weights from coefficients, and averaging weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import BASES, BF16, BLOCKS, F32, F64, candidates, expand, members, net_members
from torch import Tensor, nn

from lightning_twa import SubspaceConfig, build_subspace


@BASES
@BLOCKS
def test_gradient_equals_autograd_and_finite_differences(name, blocks) -> None:
    net, ms = net_members()
    subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
    inputs, target = torch.randn(20, 5, dtype=F64), torch.randn(20, 3, dtype=F64)
    u, c = subspace.directions, subspace.center
    block = torch.cat([torch.full((s.stop - s.start,), s.block) for s in subspace.layout.specs])

    def loss(x: Tensor) -> Tensor:
        theta = c + (u * x[:, block.long()]).sum(0)
        state = {s.name: theta[s.start : s.stop].view(s.shape) for s in subspace.layout.specs}
        return (torch.func.functional_call(net, state, inputs) - target).square().mean()

    x = 0.3 * torch.randn(subspace.num_directions, subspace.num_blocks, dtype=F64)
    subspace.expand(x, [p for _, p in net.named_parameters()])
    (net(inputs) - target).square().mean().backward()
    found = subspace.project([p.grad for p in net.parameters()])

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    differences = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = 1e-5
        differences[index] = (loss(x + step) - loss(x - step)) / 2e-5
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_other_dtypes_and_missing_ones(dtype) -> None:
    ms = members(dtype=dtype)
    subspace = build_subspace(ms)
    gradients: list[Any] = [torch.randn(s.shape, dtype=dtype) for s in subspace.layout.specs]
    gradients[1] = None
    zeros = [torch.zeros(7) if g is None else g.double() for g in gradients]
    flat = torch.cat([g.double().reshape(-1) for g in zeros])
    expected = subspace.directions.double() @ flat
    torch.testing.assert_close(subspace.project(gradients)[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 32])
def test_sparse_gradients(bits) -> None:
    ms = [{"w": torch.randn(20, 4)} for _ in range(4)]
    subspace = build_subspace(ms, SubspaceConfig(bits=bits))
    embedding = nn.Embedding(20, 4, sparse=True)
    embedding(torch.tensor([1, 1, 7])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert torch.equal(subspace.project([gradient]), subspace.project([gradient.to_dense()]))


@BASES
@BLOCKS
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_weights_are_the_averaging_weights_times_the_candidates(name, blocks, dtype) -> None:
    ms = members(dtype=dtype)
    subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
    x = torch.randn(subspace.num_directions, subspace.num_blocks, dtype=F64)
    beta = subspace.averaging_weights(x)
    assert beta.shape == (5, subspace.num_blocks)
    if name != "orthonormal":
        torch.testing.assert_close(beta.sum(0), torch.ones(subspace.num_blocks, dtype=F64))
    out = expand(subspace, x, subspace.layout.dtype)
    tolerance = 1e-12 if dtype == F64 else 2e-6
    for spec in subspace.layout.specs:
        terms = [beta[i, spec.block] * m[spec.name].double() for i, m in enumerate(ms)]
        scale = float(sum(t.abs() for t in terms).max()) if spec.stop > spec.start else 1.0
        expected = sum(terms)
        assert isinstance(expected, Tensor)
        difference = (out[spec.name].double() - expected).abs()
        assert difference.numel() == 0 or float(difference.max()) < tolerance * scale


def test_no_coefficients_is_the_uniform_average() -> None:
    ms = members(7, F32)
    subspace = build_subspace(ms)
    x = torch.zeros(subspace.num_directions, 1)
    assert torch.equal(subspace.averaging_weights(x), torch.full((7, 1), 1 / 7, dtype=F64))
    for key, value in expand(subspace, x, F32).items():
        assert torch.equal(value, torch.stack([m[key].double() for m in ms]).mean(0).float())


@BLOCKS
def test_n_minus_one_directions_contain_every_candidate(blocks) -> None:
    ms = members(6, F32)
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    centering = torch.eye(6, dtype=F64) - 1 / 6
    for i in range(6):
        x = torch.zeros(subspace.num_directions, subspace.num_blocks, dtype=F64)
        for b, mixing in enumerate(subspace.mixing):  # centering @ mixing.T @ x = e_i - 1/n
            wanted = centering[:, i]
            x[:, b] = torch.linalg.lstsq(centering @ mixing.T, wanted, driver="gelsd").solution
        for key, value in expand(subspace, x, F32).items():
            assert float((value - ms[i][key]).norm()) <= 1e-5 * float(ms[i][key].norm())


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


def test_what_a_subspace_says_of_itself() -> None:
    ms = members(5)
    subspace = build_subspace(ms, SubspaceConfig(blocks="tensor", rank=3))
    assert (subspace.num_candidates, subspace.num_directions, subspace.num_blocks) == (5, 3, 5)
    numel = 35 + 7 + 1 + 21
    assert subspace.nbytes == 8 * numel * (3 + 1)
    assert repr(subspace) == (
        f"Subspace(basis='pca', n=5, k=3, D={numel}, B=5, bits=32, bytes={8 * numel * 4}, "
        f"device='cpu', relative_error=0)"
    )
    assert subspace.local_layout is subspace.layout


def test_products_record_nothing_for_autograd() -> None:
    subspace = build_subspace(members(4))
    gradients = [torch.ones(s.shape, dtype=F64).requires_grad_() for s in subspace.layout.specs]
    assert not subspace.project(gradients).requires_grad
    x = torch.ones(3, 1, dtype=F64, requires_grad=True)
    out = [torch.zeros(s.shape, dtype=F64).requires_grad_() for s in subspace.layout.specs]
    subspace.expand(x, out)
    assert all(t.grad_fn is None for t in out)
