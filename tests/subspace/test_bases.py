"""The bases against their definitions, computed from the candidates themselves."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from reference import BLOCKS, F32, F64, block_columns, expand, members
from torch import nn

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace import bases


@BLOCKS
def test_pca_directions_are_orthogonal_with_unit_deviation_of_the_candidates(blocks) -> None:
    ms = members(6)
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    w = np.stack([reference.flatten(m) for m in ms])
    u = subspace.directions.numpy()
    for columns in block_columns(subspace):
        rows = u[:, columns]
        rows = rows[np.abs(rows).sum(1) > 0]
        centered = w[:, columns] - w[:, columns].mean(0)
        singular = np.linalg.svd(centered, compute_uv=False)
        if len(singular) == 0:
            continue
        singular = singular[singular**2 > 1e-6 * max(singular[0] ** 2, 1e-300)]
        assert len(rows) == len(singular)
        gram = rows @ rows.T
        np.testing.assert_allclose(gram, np.diag(singular**2 / len(ms)), atol=1e-12)
        coordinates = centered @ rows.T / np.diag(gram)
        np.testing.assert_allclose(coordinates.std(0), 1.0, rtol=1e-9)


def test_pca_drops_eigenvalues_below_a_millionth_and_keeps_rank() -> None:
    sizes = [1.0, 0.5, 2e-3, 5e-4]  # squared, the last is below 1e-6 of the first
    q = torch.linalg.qr(torch.randn(40, 4, dtype=F64)).Q
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, 1.0]]).double()
    rows = torch.cat([signs, -signs]) * torch.tensor(sizes, dtype=F64)
    ms = [{"w": row} for row in rows @ q.T]
    assert build_subspace(ms).num_directions == 3
    two = build_subspace(ms, SubspaceConfig(rank=2))
    assert two.num_directions == 2
    torch.testing.assert_close(two.directions.norm(dim=1), torch.tensor(sizes[:2], dtype=F64))


@BLOCKS
def test_candidates_basis_is_the_normalised_centered_candidates(blocks) -> None:
    ms = members()
    subspace = build_subspace(ms, SubspaceConfig(basis="candidates", blocks=blocks))
    w = np.stack([reference.flatten(m) for m in ms])
    for columns in block_columns(subspace):
        centered = w[:, columns] - w[:, columns].mean(0)
        norms = np.linalg.norm(centered, axis=1, keepdims=True)
        expected = np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 0)
        np.testing.assert_allclose(subspace.directions.numpy()[:, columns], expected, atol=1e-12)


def test_orthonormal_basis_is_gram_schmidt_and_its_step_an_orthogonal_projection() -> None:
    ms = members()
    subspace = build_subspace(ms, SubspaceConfig(basis="orthonormal"))
    w = np.stack([reference.flatten(m) for m in ms])
    u = subspace.directions.numpy()
    np.testing.assert_allclose(u @ u.T, np.eye(5), atol=1e-10)
    for i in range(5):  # the i-th direction lies in the span of the first i + 1 candidates
        rest = u[i] - w[: i + 1].T @ np.linalg.lstsq(w[: i + 1].T, u[i], rcond=None)[0]
        assert np.linalg.norm(rest) < 1e-10
    params = {k: nn.Parameter(torch.empty_like(v)) for k, v in ms[0].items()}
    solver = SolverConfig(name="sgd", lr=0.3, momentum=0.0, schedule="constant")
    optimizer = SubspaceOptimizer(params.items(), subspace, solver)
    before = reference.flatten(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    g = reference.flatten({k: p.grad for k, p in params.items()})
    optimizer.step()
    projected = w.T @ np.linalg.lstsq(w.T, g, rcond=None)[0]
    np.testing.assert_allclose(reference.flatten(params), before - 0.3 * projected, atol=1e-10)


def test_frozen_and_identical_tensors_contribute_nothing_and_no_nan() -> None:
    ms = members(dtype=F32)
    for m in ms:
        m["a.weight"] = ms[0]["a.weight"].clone()
    for name in ("pca", "candidates"):
        for blocks in ("global", "tensor"):
            subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
            assert bool(torch.isfinite(subspace.directions).all())
            assert bool((subspace.directions[:, :35] == 0).all())
            x = torch.randn(subspace.num_directions, subspace.num_blocks)
            assert torch.equal(expand(subspace, x, F32)["a.weight"], ms[0]["a.weight"])


def test_rounding_of_the_center_is_no_direction_of_candidates_that_lie_close_together() -> None:
    common = torch.randn(10_000)
    ms = [{"w": common + 1e-7 * torch.randn(10_000)} for _ in range(5)]
    subspace = build_subspace(ms)
    assert subspace.num_directions == 4
    assert float(subspace.mixing.sum(-1).abs().max()) < 1e-6, "directions are differences"


def test_equal_pairs_of_candidates_are_kept_finite() -> None:
    first, second = members(2)
    for name in ("pca", "candidates", "orthonormal"):
        subspace = build_subspace([first, second, dict(first)], SubspaceConfig(basis=name))
        assert bool(torch.isfinite(subspace.directions).all())
        assert bool(torch.isfinite(subspace.mixing).all())


@BLOCKS
def test_the_sign_of_a_principal_direction_does_not_depend_on_the_machine(blocks) -> None:
    subspace = build_subspace(members(6), SubspaceConfig(blocks=blocks))
    for row in subspace.mixing.flatten(0, 1):
        assert float(row[row.abs().argmax()]) >= 0


def test_principal_directions_come_largest_first() -> None:
    norms = build_subspace(members(6)).directions.norm(dim=1)
    assert norms.tolist() == sorted(norms.tolist(), reverse=True)


def test_rank_keeps_the_first_directions_of_every_block() -> None:
    ms = members(6)
    every = build_subspace(ms, SubspaceConfig(blocks="tensor"))
    some = build_subspace(ms, SubspaceConfig(blocks="tensor", rank=2))
    assert some.mixing.shape == (5, 2, 6)
    assert torch.equal(some.mixing, every.mixing[:, :2])


def test_blocks_with_fewer_directions_have_rows_of_zeros() -> None:
    ms = members(6)  # "scale" is one number, "none" has none
    mixing = build_subspace(ms, SubspaceConfig(blocks="tensor")).mixing
    assert mixing.any(dim=2).sum(dim=1).tolist() == [5, 5, 1, 0, 5]


def test_gram_schmidt_of_nearly_parallel_candidates_is_orthogonal_to_rounding() -> None:
    q = torch.linalg.qr(torch.randn(40, 4, dtype=F64)).Q.T
    gram_rows = q[0] + 1e-4 * torch.cat([torch.zeros(1, 40), q[1:]])
    mixing = bases.mix(
        SubspaceConfig(basis="orthonormal"),
        (gram_rows @ gram_rows.T)[None],
        torch.ones(1, dtype=F64),
    )[0]
    assert mixing.shape == (4, 4)
    gram = gram_rows @ gram_rows.T
    torch.testing.assert_close(mixing @ gram @ mixing.T, torch.eye(4, dtype=F64), rtol=0, atol=1e-7)


def test_a_candidate_that_depends_on_those_before_gives_no_orthonormal_direction() -> None:
    first, second = torch.randn(2, 40, dtype=F64)
    ms = [{"w": w} for w in (first, 2 * first, second, first - second, torch.zeros(40).double())]
    subspace = build_subspace(ms, SubspaceConfig(basis="orthonormal"))
    assert subspace.num_directions == 2
    assert subspace.mixing[0, 0].nonzero().flatten().tolist() == [0]
    assert subspace.mixing[0, 1].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize("name", ["pca", "candidates", "orthonormal"])
def test_what_is_below_the_rounding_of_the_center_is_no_direction(name) -> None:
    """Of candidates of norm 1, the products of differences below about 1e-15 are noise."""
    config = SubspaceConfig(basis=name)
    gram = torch.diag_embed(torch.tensor([[2.0, 1.0, 1.0]], dtype=F64))
    norm2 = torch.ones(1, dtype=F64)
    eps2 = torch.finfo(F64).eps ** 2
    assert bool(bases.mix(config, 100 * eps2 * gram, norm2).any())
    assert not bases.mix(config, eps2 * gram, norm2).any()
    assert bases.mix(config, eps2 * gram, norm2).shape[1] == (3 if name == "candidates" else 1)
    assert bool(bases.mix(config, eps2 * gram, 0.01 * norm2).any())


def test_candidates_at_the_center_have_no_normalised_direction() -> None:
    gram = torch.diag_embed(torch.tensor([[4.0, 0.0, 0.25]], dtype=F64))
    found = bases.mix(SubspaceConfig(basis="candidates"), gram, torch.ones(1, dtype=F64))
    assert torch.equal(found[0], torch.diag(torch.tensor([0.5, 0.0, 2.0], dtype=F64)))
