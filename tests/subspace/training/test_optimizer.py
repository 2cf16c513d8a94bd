"""A phase, step by step, against the reference; what interrupts it; misuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import BLOCKS, F32, F64, SOLVERS, Net, Quadratic, block_columns, members, net_members
from torch import Tensor

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace


@pytest.mark.parametrize("solver", SOLVERS)
@BLOCKS
def test_a_phase_equals_the_reference_step_by_step(solver, blocks) -> None:
    config = SolverConfig(**SOLVERS[solver])
    net, ms = net_members()
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    total = 25
    optimizer = SubspaceOptimizer(net.named_parameters(), subspace, config, total_steps=total)
    u, columns = subspace.directions.numpy(), block_columns(subspace)
    k, b = subspace.num_directions, subspace.num_blocks

    def make() -> Any:
        if config.name == "sgd":
            return reference.SGD(k, config.momentum, config.weight_decay)
        kind = reference.AdamW if config.name == "adamw" else reference.FullMatrixAdam
        return kind(k, config.betas, config.weight_decay)

    solvers = [make() for _ in range(b)]
    factors = [reference.factor(config.schedule, t, total, config.warmup) for t in range(total)]
    peak = config.lr if config.lr is not None else (config.radius or 2.0) / sum(factors)
    x, path = np.zeros((k, b)), np.zeros(b)
    for step in range(total):
        inputs, target = torch.randn(8, 5, dtype=F64), torch.randn(8, 3, dtype=F64)
        optimizer.zero_grad()
        (net(inputs) - target).square().mean().backward()
        g = reference.flatten({n: p.grad for n, p in net.named_parameters()})
        optimizer.step()
        lr = peak * factors[step]
        for i in range(b):
            new = solvers[i].step(x[:, i], u[:, columns[i]] @ g[columns[i]], lr)
            length = np.linalg.norm(new - x[:, i])
            if config.lr is None and length > lr:
                new = x[:, i] + (new - x[:, i]) * lr / length
            path[i] += np.linalg.norm(new - x[:, i])
            x[:, i] = new
        np.testing.assert_allclose(optimizer.coefficients.numpy(), x, rtol=1e-7, atol=1e-9)
        assert optimizer.last_lr == pytest.approx(lr)
    np.testing.assert_allclose(optimizer.path_length.numpy(), path, rtol=1e-7)
    if config.lr is None:
        assert path.max() <= (config.radius or 2.0) * (1 + 1e-9)
    theta = {s.name: torch.empty(s.shape, dtype=F64) for s in subspace.layout.specs}
    subspace.expand(torch.tensor(x), list(theta.values()))
    np.testing.assert_allclose(
        reference.flatten(dict(net.named_parameters())), reference.flatten(theta), atol=1e-8
    )


def test_a_rate_set_from_outside_does_not_change_the_budget() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=8)
    used = []
    for _ in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 7.0
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        used.append(optimizer.last_lr)
    assert sum(used) == pytest.approx(2.0)
    assert float(optimizer.path_length) <= 2.0


def test_a_scheduler_of_the_user_s_can_drive_a_constant_schedule() -> None:
    net, ms = net_members()
    solver = SolverConfig(schedule="constant", lr=0.1)
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), solver)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    used = []
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        scheduler.step()
        used.append(optimizer.last_lr)
    assert used == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_weights_never_leave_the_affine_hull(dtype) -> None:
    net = Net().to(dtype)
    named = list(net.named_parameters())
    ms = [{k: p.detach() + 0.2 * torch.randn_like(p) for k, p in named} for _ in range(5)]
    optimizer = SubspaceOptimizer(named, build_subspace(ms), total_steps=30)
    w = np.stack([reference.flatten(m) for m in ms])
    center = w.mean(0)
    for _ in range(30):
        optimizer.zero_grad()
        net(torch.randn(9, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
        moved = reference.flatten(dict(named)) - center
        rest = moved - (w - center).T @ np.linalg.lstsq((w - center).T, moved, rcond=None)[0]
        assert np.linalg.norm(rest) < 1e-5 * np.linalg.norm(center)
    assert np.linalg.norm(moved) > 1e-3


def test_closure_is_called_and_its_loss_returned() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 5, dtype=F64)).square().mean()
        loss.backward()
        return loss

    before = optimizer.coefficients.clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, optimizer.coefficients)


@pytest.mark.filterwarnings("ignore:The 3 candidates are equal up to rounding")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_equal_candidates_make_a_phase_that_does_nothing(dtype) -> None:
    net = Net().to(dtype)
    ms = [{k: p.detach().clone() for k, p in net.named_parameters()} for _ in range(3)]
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(4, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
    for key, parameter in net.named_parameters():
        assert torch.equal(parameter, ms[0][key])
    torch.testing.assert_close(optimizer.averaging_weights, torch.full((3, 1), 1 / 3, dtype=F64))


def test_without_any_gradient_nothing_moves_and_no_step_is_counted() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert optimizer.steps == 0
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(bad) -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, bad)
    with pytest.warns(UserWarning, match="step 0 of the TWA phase is not finite"):
        optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def test_sam_takes_the_gradient_up_the_slope() -> None:
    """One step of SGD with momentum 0 is the reference formula."""
    torch.manual_seed(3)
    ms = members(4)
    model = Quadratic(ms, torch.tensor([0.9, 0.3, -0.1, -0.1], dtype=F64))
    subspace = build_subspace(ms, SubspaceConfig(basis="candidates"))
    solver = SolverConfig(name="sgd", lr=0.1, momentum=0.0, sam_rho=0.3, schedule="constant")
    optimizer = SubspaceOptimizer(model.parameters(), subspace, solver)
    u, c = subspace.directions, subspace.center
    target = torch.cat([t.reshape(-1) for t in model.target.values()])
    gradient_at = lambda x: 2 * u @ (c + x @ u - target)  # noqa: E731
    x = torch.zeros(4, dtype=F64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    for _ in range(3):
        first = float(optimizer.step(closure).detach())
        assert first == pytest.approx(float((c + x @ u - target).square().sum()))
        g = gradient_at(x)
        x = x - 0.1 * gradient_at(x + 0.3 * g / g.norm())
        torch.testing.assert_close(optimizer.coefficients[:, 0], x)


@pytest.mark.parametrize(
    ("config", "solver"),
    [
        (SubspaceConfig(), SolverConfig(sam_rho=0.5)),
        (SubspaceConfig(parametrization="mask"), SolverConfig()),
    ],
    ids=["sam", "mask"],
)
def test_weights_are_settled_after_an_exception_in_the_closure(config, solver) -> None:
    ms = members(4)
    model = Quadratic(ms, torch.full((4,), 0.25, dtype=F64))
    optimizer = SubspaceOptimizer(
        model.parameters(), build_subspace(ms, config), solver, total_steps=10
    )
    settled = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        moved = not all(map(torch.equal, settled, model.parameters()))
        if moved:
            raise KeyError("a test asks")
        loss = model.loss() + sum(p.sum() for p in model.parameters())
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls == (2 if solver.sam_rho else 1)
    assert all(map(torch.equal, settled, model.parameters()))
    assert optimizer.steps == 0
    model.loss().backward()
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()


def spied(optimizer: SubspaceOptimizer) -> list[tuple[int, float]]:
    """Step and progress of every sample that is drawn from now on."""
    drawn = []
    plain = optimizer.parametrization.sample

    def sample(raw: Tensor, step: int, progress: float) -> Tensor:
        drawn.append((step, progress))
        return plain(raw, step, progress)

    optimizer.parametrization.sample = sample  # type: ignore[method-assign]
    return drawn


@pytest.mark.parametrize("total", [4, None])
def test_samples_of_a_mask_are_of_the_step_and_the_progress_of_the_phase(total) -> None:
    ms = members(5)
    model = Quadratic(ms, torch.full((5,), 0.2, dtype=F64))
    solver = SolverConfig(lr=0.1, schedule="constant")
    subspace = build_subspace(ms, SubspaceConfig(parametrization="mask"))
    optimizer = SubspaceOptimizer(model.parameters(), subspace, solver, total_steps=total)
    drawn = spied(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    # twice each: for the loss, and for the gradient in the raw parameters
    progress = [0, 0.25, 0.5, 0.75, 1.0, 1.0] if total else [0.5] * 6
    assert drawn == [(step, p) for step, p in enumerate(progress) for _ in range(2)]


@pytest.mark.parametrize("parametrization", ["free", "mask"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.3])
def test_a_closure_without_gradients_moves_nothing(parametrization, sam_rho) -> None:
    ms = members(4)
    model = Quadratic(ms, torch.full((4,), 0.25, dtype=F64))
    subspace = build_subspace(ms, SubspaceConfig(parametrization=parametrization))
    optimizer = SubspaceOptimizer(
        model.parameters(), subspace, SolverConfig(sam_rho=sam_rho), total_steps=4
    )
    before = [p.detach().clone() for p in model.parameters()]
    calls = []
    assert optimizer.step(lambda: calls.append(1) or "loss") == "loss"
    assert len(calls) == 1
    assert optimizer.steps == 0
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.filterwarnings("ignore:The gradient at optimizer step")
@pytest.mark.parametrize(("gradient", "steps"), [(0.0, 1), (float("inf"), 0), (float("nan"), 0)])
def test_sam_goes_nowhere_up_a_slope_that_is_flat_or_not_finite(gradient, steps) -> None:
    ms = members(4)
    model = Quadratic(ms, torch.full((4,), 0.25, dtype=F64))
    optimizer = SubspaceOptimizer(
        model.parameters(), build_subspace(ms), SolverConfig(sam_rho=0.3), total_steps=4
    )
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure() -> None:
        calls.append(1)
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)

    optimizer.step(closure)
    assert len(calls) == 1
    assert (optimizer.steps, optimizer.skipped_steps) == (steps, 1 - steps)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_rate_of_zero_without_a_slope_only_wants_to_see_a_state() -> None:
    """As torch.distributed.checkpoint does it: no step is counted, no closure asked for."""
    for config in (SubspaceConfig(), SubspaceConfig(parametrization="mask")):
        net, ms = net_members()
        optimizer = SubspaceOptimizer(
            net.named_parameters(), build_subspace(ms, config), total_steps=5
        )
        lr = optimizer.param_groups[0]["lr"]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        assert optimizer.steps == 0
        optimizer.param_groups[0]["lr"] = lr
        if config.parametrization == "free":
            optimizer.step()
            assert optimizer.steps == 1
            optimizer.param_groups[0]["lr"] = 0.0
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert optimizer.steps == 2


def test_closures_run_with_gradients_on_and_where_the_caller_has_them_off() -> None:
    for config in (SubspaceConfig(), SubspaceConfig(parametrization="mask")):
        net, ms = net_members()
        optimizer = SubspaceOptimizer(
            net.named_parameters(), build_subspace(ms, config), total_steps=5
        )

        def closure(net: Net = net) -> Tensor:
            loss = net(torch.ones(2, 5, dtype=F64)).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            optimizer.step(closure)
        assert optimizer.steps == 1
        assert optimizer.raw.grad is None
