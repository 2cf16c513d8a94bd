"""The optimizers of the coefficients."""

from __future__ import annotations

import pytest
import torch
from reference import F64
from torch import Tensor, nn

from lightning_twa import SolverConfig
from lightning_twa.subspace import FullMatrixAdam
from lightning_twa.subspace.training import solvers


def test_full_matrix_adam_does_not_depend_on_rotation_or_scale_of_the_loss() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q
    gradients = torch.randn(30, 4, 2, dtype=F64)
    results = []
    for turn, scale in ((torch.eye(4, dtype=F64), 1.0), (rotation, 1.0), (rotation, 1e4)):
        x = nn.Parameter(torch.zeros(4, 2, dtype=F64))
        optimizer = FullMatrixAdam([x], lr=0.1)
        for g in gradients:
            x.grad = scale * turn @ g
            optimizer.step()
        results.append(turn.T @ x.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-10)


def test_one_step_written_down_by_hand() -> None:
    """Of two blocks, the second without a gradient: ``S`` is zero there, and nothing moves."""
    x = nn.Parameter(torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64))
    optimizer = FullMatrixAdam([x], lr=0.1, betas=(0.5, 0.9), ridge=0.02)
    x.grad = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=F64)
    optimizer.step()
    # m = g and S = g g^T after the correction of their bias: eigenvalues 25 + .25 and .25 along g
    along = 0.1 * 5 / 25.25**0.5
    expected = torch.tensor([[1 - 0.6 * along, 1.0], [2 - 0.8 * along, 2.0]], dtype=F64)
    torch.testing.assert_close(x.detach(), expected)
    assert int(optimizer.state[x]["step"]) == 1


def test_weight_decay_shrinks_the_coefficients_apart_from_the_step() -> None:
    x = nn.Parameter(torch.full((2, 1), 3.0, dtype=F64))
    optimizer = FullMatrixAdam([x], lr=0.1, weight_decay=0.5)
    x.grad = torch.zeros(2, 1, dtype=F64)
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.full((2, 1), 3.0 * 0.95, dtype=F64))


def test_parameters_without_a_gradient_stay_and_a_closure_is_called_with_gradients_on() -> None:
    x, y = (nn.Parameter(torch.ones(2, 1, dtype=F64)) for _ in range(2))
    optimizer = FullMatrixAdam([x, y], lr=0.1, weight_decay=0.5)

    def closure() -> Tensor:
        loss = y.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.equal(x.detach(), torch.ones(2, 1, dtype=F64))
    assert x not in optimizer.state
    assert bool((y < 1).all())
    x.grad = y.grad = None
    assert optimizer.step() is None


def test_eigenvalues_that_rounding_left_below_zero() -> None:
    second_moment = torch.diag_embed(torch.tensor([[-1e-18, 1.0]], dtype=F64))
    mean = torch.tensor([[1e-20], [1.0]], dtype=F64)
    found = solvers._precondition(second_moment, mean, 0.0)
    torch.testing.assert_close(found, torch.tensor([[0.0], [1.0]], dtype=F64))


@pytest.mark.parametrize(
    ("config", "kind", "options"),
    [
        (
            SolverConfig(betas=(0.8, 0.95), weight_decay=0.1),
            FullMatrixAdam,
            {"betas": (0.8, 0.95), "weight_decay": 0.1, "ridge": 1e-3},
        ),
        (
            SolverConfig(name="adamw", betas=(0.8, 0.95), weight_decay=0.1),
            torch.optim.AdamW,
            {"betas": (0.8, 0.95), "weight_decay": 0.1},
        ),
        (
            SolverConfig(name="sgd", lr=0.2, momentum=0.7, weight_decay=0.1),
            torch.optim.SGD,
            {"momentum": 0.7, "weight_decay": 0.1, "nesterov": False},
        ),
    ],
)
def test_the_solver_that_the_configuration_names(config, kind, options) -> None:
    x = torch.zeros(3, 1, dtype=F64)
    solver = solvers.make_solver(config, x, 0.2)
    assert type(solver) is kind
    (group,) = solver.param_groups
    assert group["params"][0] is x
    assert {"lr": 0.2, **options}.items() <= {**group, "params": None}.items()


def test_steps_longer_than_allowed_are_shortened_block_by_block() -> None:
    before = torch.ones(2, 3, dtype=F64)
    after = before + torch.tensor([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]], dtype=F64)
    length = solvers.limit_step(before, after, 1.0)
    torch.testing.assert_close(length, torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    expected = torch.tensor([[0.6, 0.3, 0.0], [0.8, 0.4, 0.0]], dtype=F64)
    torch.testing.assert_close(after - before, expected)


def test_without_a_limit_a_step_is_only_measured() -> None:
    before = torch.ones(2, 1, dtype=F64)
    after = before + torch.tensor([[3.0], [4.0]], dtype=F64)
    kept = after.clone()
    assert solvers.limit_step(before, after, None).tolist() == [5.0]
    assert torch.equal(after, kept)
