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


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupted_phase_goes_on_bitwise(solver, tmp_path) -> None:
    config = SolverConfig(**SOLVERS[solver])
    net, ms = net_members()
    batches = torch.randn(20, 8, 5, dtype=F64)

    def train(optimizer: SubspaceOptimizer, model: Net, some: Tensor) -> None:
        for inputs in some:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    first = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), config, total_steps=20)
    train(first, net, batches[:7])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    train(first, net, batches[7:])
    other = Net()
    second = SubspaceOptimizer(other.named_parameters(), build_subspace(ms), config, total_steps=20)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, other, batches[7:])
    assert torch.equal(first.coefficients, second.coefficients)
    assert all(
        torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)
    )
    assert first.steps == second.steps == 20
    assert torch.equal(first.path_length, second.path_length)


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


def test_parameters_that_do_not_match_are_refused() -> None:
    net, ms = net_members()
    subspace = build_subspace(ms)
    with pytest.raises(ValueError, match=r"spans 'b\.bias', which is not among the parameters"):
        SubspaceOptimizer(list(net.named_parameters())[:-1], subspace, total_steps=1)
    with pytest.raises(ValueError, match="Got 3 parameters, but the subspace spans 4"):
        SubspaceOptimizer(list(net.parameters())[:-1], subspace, total_steps=1)
    with pytest.raises(ValueError, match=r"The parameter for 'a\.weight' has shape \(3,\)"):
        SubspaceOptimizer(list(net.parameters())[::-1], subspace, total_steps=1)


def test_unknown_length_and_radius_without_deviations_are_refused() -> None:
    net, ms = net_members()
    with pytest.raises(ValueError, match="total_steps is needed for schedule='cosine'"):
        SubspaceOptimizer(net.named_parameters(), build_subspace(ms))
    with pytest.raises(ValueError, match=r"total_steps=0\. Must be an int >= 1"):
        SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=0)
    normalised = build_subspace(ms, SubspaceConfig(basis="candidates"))
    with pytest.raises(ValueError, match=r"basis='candidates' needs SolverConfig\.lr"):
        SubspaceOptimizer(net.named_parameters(), normalised, total_steps=3)


def test_state_of_another_size_is_refused() -> None:
    net, ms = net_members(5)
    small = SubspaceOptimizer(net.named_parameters(), build_subspace(ms[:3]), total_steps=3)
    large = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=3)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), but this subspace needs \(4, 1\)"):
        large.load_state_dict(small.state_dict())


def test_a_state_does_not_change_with_later_steps() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)

    def step() -> None:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step()
    state = optimizer.state_dict()
    before = state["solver"]["state"][0]["exp_avg"].clone()
    step()
    assert torch.equal(state["solver"]["state"][0]["exp_avg"], before)
