"""Parametrizations of the averaging weights, against plain float64 references."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import F64, Quadratic, expand, members
from torch import Tensor

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace.training.parametrizations import (
    Mask,
    Simplex,
    make_parametrization,
    pull_back,
)


def mix(ms: list[dict[str, Tensor]], beta: Tensor, subspace: Any) -> dict[str, Tensor]:
    """``sum_i beta[i, b] w_i``."""
    blocks = {spec.name: spec.block for spec in subspace.layout.specs}
    return {
        name: sum(b * m[name] for b, m in zip(beta[:, blocks[name]], ms, strict=True))
        for name in ms[0]
    }


@pytest.mark.parametrize("blocks", ["global", "tensor", 30])
@pytest.mark.parametrize("basis", ["pca", "candidates"])
@pytest.mark.parametrize("name", ["simplex", "mask"])
def test_coefficients_give_the_average_with_these_weights(name, basis, blocks) -> None:
    ms = members(6)
    subspace = build_subspace(ms, SubspaceConfig(basis=basis, blocks=blocks, parametrization=name))
    parametrization = make_parametrization(subspace)
    assert parametrization.shape == (6, subspace.num_blocks)
    for scale in (0.0, 0.3, 3.0):
        raw = scale * torch.randn(parametrization.shape, dtype=F64)
        beta = parametrization.averaging_weights(raw)
        assert bool((beta >= 0).all())
        torch.testing.assert_close(beta.sum(0), torch.ones(subspace.num_blocks, dtype=F64))
        theta = expand(subspace, parametrization.coefficients(raw))
        for key, expected in mix(ms, beta, subspace).items():
            torch.testing.assert_close(theta[key], expected, rtol=1e-9, atol=1e-9)


def test_candidates_that_depend_on_each_other() -> None:
    ms = members(4)
    ms += [dict(ms[0]), {k: (ms[1][k] + ms[2][k]) / 2 for k in ms[0]}]
    for basis in ("pca", "candidates"):
        subspace = build_subspace(ms, SubspaceConfig(basis=basis, parametrization="simplex"))
        parametrization = make_parametrization(subspace)
        raw = torch.randn(6, 1, dtype=F64)
        theta = expand(subspace, parametrization.coefficients(raw))
        for key, expected in mix(ms, parametrization.averaging_weights(raw), subspace).items():
            torch.testing.assert_close(theta[key], expected, rtol=1e-8, atol=1e-8)


def test_a_step_of_the_simplex_is_as_long_as_that_of_its_coefficients() -> None:
    subspace = build_subspace(members(7), SubspaceConfig(parametrization="simplex"))
    parametrization = Simplex(subspace)
    raw = torch.zeros(7, 1, dtype=F64)
    step = torch.randn(7, 1, dtype=F64)
    step -= step.mean()
    moved = parametrization.coefficients(raw + 1e-6 * step)
    assert float(moved.norm() / (1e-6 * step).norm()) == pytest.approx(1, rel=1e-4)


def test_probabilities_of_a_mask_sum_to_its_size_also_where_logits_are_large() -> None:
    subspace = build_subspace(members(9), SubspaceConfig(blocks="tensor", parametrization="mask"))
    for size, scale in itertools.product((1, 4, 8), (0.1, 5.0, 100.0)):
        mask = Mask(subspace, size)
        logits = scale * torch.randn(9, subspace.num_blocks, dtype=F64)
        kept = torch.sigmoid(logits + mask._shift(logits)).sum(0)
        torch.testing.assert_close(kept, torch.full_like(kept, size), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["simplex", "mask"])
def test_the_gradient_of_a_sample_is_right(name) -> None:
    subspace = build_subspace(members(5), SubspaceConfig(blocks="tensor", parametrization=name))
    parametrization = make_parametrization(subspace)
    raw = (0.2 * torch.randn(parametrization.shape, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: parametrization.sample(r, step=3, progress=0.4), (raw,), atol=1e-5
    )


def test_a_mask_is_a_uniform_average_of_the_most_probable() -> None:
    subspace = build_subspace(members(5), SubspaceConfig(parametrization="mask", mask_size=2))
    parametrization = make_parametrization(subspace)
    raw = torch.tensor([[0.1], [-0.2], [0.5], [0.0], [0.2]], dtype=F64)
    beta = parametrization.averaging_weights(raw)
    assert beta.flatten().tolist() == [0, 0, 0.5, 0, 0.5]
    among_equals = parametrization.averaging_weights(torch.zeros(5, 1, dtype=F64))
    assert among_equals.flatten().tolist() == [0, 0, 0, 0.5, 0.5]


def test_samples_of_a_mask_grow_sharp_and_repeat() -> None:
    subspace = build_subspace(members(6), SubspaceConfig(parametrization="mask", mask_size=2))
    mask = make_parametrization(subspace)
    raw = torch.randn(6, 1, dtype=F64)
    assert torch.equal(mask.sample(raw, 7, 0.5), mask.sample(raw, 7, 0.5))
    assert not torch.equal(mask.sample(raw, 7, 0.5), mask.sample(raw, 8, 0.5))

    def entropy(progress: float) -> float:
        total = 0.0
        for step in range(50):
            beta = subspace.averaging_weights(mask.sample(raw, step, progress)).clamp_min(1e-12)
            total -= float((beta * beta.log()).sum())
        return total / 50

    assert entropy(1.0) < entropy(0.0)


def test_half_of_the_candidates_rounded_up_and_too_few() -> None:
    subspace = build_subspace(members(5), SubspaceConfig(parametrization="mask"))
    assert make_parametrization(subspace).size == 3
    subspace = build_subspace(members(3), SubspaceConfig(parametrization="mask", mask_size=3))
    with pytest.raises(ValueError, match="mask_size=3 keeps 3 of 3 candidates"):
        make_parametrization(subspace)


def kept_probability(logits: Tensor, size: int) -> Tensor:
    """``sigmoid(logits + s)`` with the sum ``size``, by bisection of one block."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.sigmoid(logits + middle).sum()) > size:
            high = middle
        else:
            low = middle
    return torch.sigmoid(logits + low)


@pytest.mark.parametrize(("progress", "temperature"), [(0.0, 1.0), (0.5, 0.1**0.5), (1.0, 0.1)])
def test_a_sample_is_a_relaxed_mask_whose_temperature_falls_from_1_to_a_tenth(
    progress, temperature
) -> None:
    ms = members(6)
    subspace = build_subspace(
        ms, SubspaceConfig(blocks="tensor", parametrization="mask", mask_size=2)
    )
    mask = make_parametrization(subspace)
    raw = 0.5 * torch.randn(6, subspace.num_blocks, dtype=F64)
    step = 11
    generator = torch.Generator().manual_seed(20502 + step)
    uniform = torch.rand(raw.shape, generator=generator, dtype=F64)
    noise = (uniform / (1 - uniform)).log()
    sample = expand(subspace, mask.sample(raw, step, progress))
    beta = torch.empty_like(raw)
    for b in range(subspace.num_blocks):
        p = kept_probability(6**0.5 * raw[:, b], 2)
        relaxed = torch.sigmoid(((p / (1 - p)).log() + noise[:, b]) / temperature)
        beta[:, b] = relaxed / relaxed.sum()
    for key, expected in mix(ms, beta, subspace).items():
        torch.testing.assert_close(sample[key], expected, rtol=1e-7, atol=1e-7)


def test_a_pulled_back_gradient_is_that_of_the_same_sample() -> None:
    subspace = build_subspace(members(5), SubspaceConfig(parametrization="mask", mask_size=2))
    mask = make_parametrization(subspace)
    raw = torch.randn(5, 1, dtype=F64)
    gradient = torch.randn(subspace.num_directions, 1, dtype=F64)
    for step, progress in ((0, 0.0), (3, 0.7)):
        leaf = raw.clone().requires_grad_()
        (mask.sample(leaf, step, progress) * gradient).sum().backward()
        found = pull_back(mask, raw, gradient, step, progress)
        torch.testing.assert_close(found, leaf.grad)
    assert not raw.requires_grad
    free = make_parametrization(build_subspace(members(5)))
    assert pull_back(free, gradient, gradient, 0, 0.0) is gradient


@pytest.mark.parametrize("name", ["free", "simplex"])
def test_without_samples_training_uses_the_coefficients_themselves(name) -> None:
    subspace = build_subspace(members(5), SubspaceConfig(parametrization=name))
    parametrization = make_parametrization(subspace)
    raw = torch.randn(parametrization.shape, dtype=F64)
    assert not parametrization.samples
    assert torch.equal(parametrization.sample(raw, 3, 0.5), parametrization.coefficients(raw))


@pytest.mark.parametrize(("n", "size"), [(2, 1), (4, 2), (5, 3), (6, 3)])
def test_half_of_the_candidates_rounded_up(n, size) -> None:
    subspace = build_subspace(members(n), SubspaceConfig(parametrization="mask"))
    mask = make_parametrization(subspace)
    assert mask.size == size
    assert mask.samples


def learn(config: SubspaceConfig, solver: SolverConfig, beta: Tensor, steps: int = 200) -> Any:
    ms = members(len(beta))
    model = Quadratic(ms, beta)
    subspace = build_subspace(ms, config)
    optimizer = SubspaceOptimizer(model.parameters(), subspace, solver, total_steps=steps)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        settled = [p.detach().clone() for p in model.parameters()]
        optimizer.write_parameters()
        assert all(map(torch.equal, settled, model.parameters()))
    return optimizer, model


@pytest.mark.parametrize("basis", ["pca", "candidates"])
def test_the_simplex_finds_an_average_inside_of_it(basis) -> None:
    beta = torch.tensor([0.5, 0.1, 0.1, 0.25, 0.05], dtype=F64)
    solver = SolverConfig(radius=6.0) if basis == "pca" else SolverConfig(lr=0.05)
    optimizer, _ = learn(SubspaceConfig(basis=basis, parametrization="simplex"), solver, beta)
    torch.testing.assert_close(optimizer.averaging_weights[:, 0], beta, atol=0.02, rtol=0)


def test_the_simplex_does_not_leave_the_convex_hull() -> None:
    beta = torch.tensor([1.5, -0.5, 0.2, -0.2], dtype=F64)
    optimizer, _ = learn(SubspaceConfig(parametrization="simplex"), SolverConfig(radius=20.0), beta)
    learned = optimizer.averaging_weights[:, 0]
    assert bool((learned >= 0).all())
    assert int(learned.argmax()) == 0
    assert float(learned[0]) > 0.8


@pytest.mark.parametrize("kept", [{0, 3}, {1, 2}, {4, 5}])
def test_a_mask_finds_the_subset(kept) -> None:
    beta = torch.zeros(6, dtype=F64)
    beta[list(kept)] = 0.5
    config = SubspaceConfig(parametrization="mask", mask_size=2)
    optimizer, model = learn(config, SolverConfig(radius=10.0), beta, steps=300)
    assert set(optimizer.averaging_weights[:, 0].nonzero().flatten().tolist()) == kept
    assert float(model.loss().detach()) < 1e-12


def test_state_of_a_mask_goes_on_exactly() -> None:
    ms = members(5)
    beta = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=F64)
    config = SubspaceConfig(parametrization="mask", blocks="tensor")
    runs = []
    for interrupted in (False, True):
        model = Quadratic(ms, beta)
        optimizer = SubspaceOptimizer(model.parameters(), build_subspace(ms, config), total_steps=9)
        for step in range(9):
            if interrupted and step == 4:
                state = optimizer.state_dict()
                model = Quadratic(ms, beta)
                subspace = build_subspace(ms, config)
                optimizer = SubspaceOptimizer(model.parameters(), subspace, total_steps=9)
                optimizer.load_state_dict(state)

            def closure(model: Any = model) -> Tensor:
                model.zero_grad()
                loss = model.loss()
                loss.backward()
                return loss

            optimizer.step(closure)
        runs.append(optimizer.raw)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parametrization": "convex"}, "parametrization='convex'. Must be one of"),
        ({"parametrization": "simplex", "basis": "orthonormal"}, "needs a basis with a center"),
        ({"parametrization": "mask", "rank": 2}, "needs all directions, but rank=2"),
        ({"mask_size": 3}, "mask_size=3 needs parametrization='mask'"),
        ({"parametrization": "mask", "mask_size": 0}, "Invalid SubspaceConfig.mask_size=0"),
    ],
)
def test_bad_settings(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceConfig(**arguments)
