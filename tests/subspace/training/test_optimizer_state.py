"""What an optimizer is made with, and its state: interrupted, resumed, and of other lengths."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from reference import F64, SOLVERS, Net, net_members
from torch import Tensor

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupted_phase_goes_on_bitwise(solver, at_once, tmp_path, monkeypatch) -> None:
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
    other, state = Net(), torch.load(tmp_path / "state.pt", weights_only=True)
    subspace, written = build_subspace(ms), []
    expand = subspace.expand
    monkeypatch.setattr(subspace, "expand", lambda *args: (written.append(1), expand(*args)))
    how = {"total_steps": 20, "state": state if at_once else None}
    second = SubspaceOptimizer(other.named_parameters(), subspace, config, **how)
    if not at_once:
        second.load_state_dict(state)
    assert len(written) == (1 if at_once else 2)
    train(second, other, batches[7:])
    assert torch.equal(first.coefficients, second.coefficients)
    assert all(
        torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)
    )
    assert first.steps == second.steps == 20
    assert torch.equal(first.path_length, second.path_length)


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


def optimizer_of(solver: SolverConfig | None = None, total: int | None = 10, **config: Any) -> Any:
    net, ms = net_members()
    subspace = build_subspace(ms, SubspaceConfig(**config))
    return SubspaceOptimizer(net.named_parameters(), subspace, solver, total_steps=total)


def take(optimizer: SubspaceOptimizer, steps: int) -> None:
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()


def test_what_a_new_optimizer_shows() -> None:
    optimizer = optimizer_of(SolverConfig(radius=3.0, weight_decay=0.25, betas=(0.7, 0.99)))
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.25, 0.7)
    assert optimizer.radius == 3.0
    # warm-up of 2 steps (1/3, 2/3), then 8 steps of a cosine, which sum to 4.5
    assert optimizer.peak_lr == pytest.approx(3.0 / 5.5)
    assert group["lr"] == pytest.approx(optimizer.peak_lr / 3)
    assert (optimizer.steps, optimizer.skipped_steps, optimizer.last_lr) == (0, 0, 0.0)
    assert optimizer.coefficient_norm == 0.0
    assert optimizer_of().radius == 2.0
    sgd = optimizer_of(SolverConfig(name="sgd", lr=0.1, momentum=0.6))
    assert sgd.param_groups[0]["momentum"] == 0.6
    assert sgd.peak_lr == 0.1


def test_coefficient_norm_is_the_root_mean_square_over_blocks() -> None:
    optimizer = optimizer_of(blocks="tensor")
    optimizer.raw[:] = 0
    optimizer.raw[0, 0], optimizer.raw[1, 0], optimizer.raw[2, 3] = 3.0, 4.0, 1.0
    assert optimizer.coefficient_norm == pytest.approx((26 / 4) ** 0.5)


def test_a_state_holds_what_a_run_needs_to_go_on() -> None:
    optimizer = optimizer_of()
    take(optimizer, 3)
    optimizer.attempts += 2
    optimizer._position += 1
    state = optimizer.state_dict()
    assert {k: v for k, v in state.items() if not isinstance(v, (Tensor, dict))} == {
        "steps": 3,
        "skipped_steps": 2,
        "position": 4,
        "total_steps": 10,
        "peak_lr": optimizer.peak_lr,
        "lr": optimizer.param_groups[0]["lr"],
    }
    other = optimizer_of(SolverConfig(radius=7.0))
    other.load_state_dict(state)
    assert (other.steps, other.skipped_steps) == (3, 2)
    assert other.peak_lr == optimizer.peak_lr
    assert other.param_groups[0]["lr"] == optimizer.peak_lr * other_factor(4, 10)
    assert torch.equal(other.path_length, optimizer.path_length)
    x, spans = other.coefficients, other.subspace.layout.specs
    theta = [torch.empty(spec.shape, dtype=F64) for spec in spans]
    other.subspace.expand(x, theta)
    assert all(map(torch.equal, theta, other.param_groups[0]["params"]))
    take(other, 1)  # nothing of the loaded state is shared
    assert state["steps"] == 3
    assert torch.equal(state["path_length"], optimizer.path_length)
    assert torch.equal(state["coefficients"], optimizer.raw)


def test_a_state_of_an_earlier_version_has_no_length_and_no_peak() -> None:
    optimizer = optimizer_of()
    take(optimizer, 3)
    state = optimizer.state_dict()
    del state["total_steps"], state["peak_lr"]
    state["skipped_steps"] = 4  # these did not use up their places in the schedule then
    other = optimizer_of()
    other.load_state_dict(state)
    assert other.peak_lr == optimizer.peak_lr
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("total", [6, 40])
def test_what_is_left_of_the_radius_is_divided_among_the_steps_left(total) -> None:
    optimizer = optimizer_of()
    take(optimizer, 4)
    other = optimizer_of(total=total)
    fresh = other.peak_lr
    other.load_state_dict(optimizer.state_dict())
    left = 2.0 - float(optimizer.path_length.max())
    factors = [other_factor(step, total) for step in range(4, total)]
    assert other.peak_lr == pytest.approx(min(fresh, left / sum(factors)))
    assert other.param_groups[0]["lr"] == pytest.approx(other.peak_lr * factors[0])
    take(other, total - 4)
    assert float(other.path_length.max()) <= 2.0 * (1 + 1e-9)
    # of a longer phase a small share of the path was expected after these steps
    assert (other.peak_lr < fresh) == (total == 40)


def other_factor(step: int, total: int) -> float:
    return reference.factor("cosine", step, total, 0.2)


def test_a_phase_that_has_spent_its_radius_stays_where_it_is() -> None:
    optimizer = optimizer_of()
    take(optimizer, 10)
    state = optimizer.state_dict()
    state["path_length"] = torch.full_like(state["path_length"], 2.5)
    other = optimizer_of(total=20)
    other.load_state_dict(state)
    assert other.peak_lr == 0.0


def test_a_rate_of_the_user_s_is_kept_where_the_length_changes() -> None:
    solver = SolverConfig(lr=0.3)
    optimizer = optimizer_of(solver)
    take(optimizer, 4)
    other = optimizer_of(SolverConfig(lr=0.4), total=20)
    other.load_state_dict(optimizer.state_dict())
    assert other.peak_lr == 0.4
    assert other.param_groups[0]["lr"] == pytest.approx(0.4)


def test_without_a_length_the_rate_of_the_state_goes_on() -> None:
    solver = SolverConfig(schedule="constant", lr=0.3)
    optimizer = optimizer_of(solver, total=None)
    optimizer.param_groups[0]["lr"] = 0.05
    other = optimizer_of(solver, total=None)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    take(other, 1)
    assert other.last_lr == 0.05
    assert other.param_groups[0]["lr"] == 0.05


def test_a_solver_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="trains no coefficients"):
        optimizer_of(SolverConfig(name="uniform"))
    with pytest.raises(ValueError, match="total_steps is needed for schedule='constant'"):
        optimizer_of(SolverConfig(schedule="constant"), total=None)
    with pytest.raises(ValueError, match="total_steps is needed for schedule='linear'"):
        optimizer_of(SolverConfig(schedule="linear", lr=0.1), total=None)
    optimizer_of(total=1)


def test_how_many_more_parameters_are_missing_is_said() -> None:
    net, ms = net_members()
    named, subspace = list(net.named_parameters()), build_subspace(ms)
    with pytest.raises(ValueError, match=r"parameters given\. Build it"):
        SubspaceOptimizer(named[:3], subspace, total_steps=1)
    with pytest.raises(ValueError, match=r"parameters given \(nor 1 more\)\. Build it"):
        SubspaceOptimizer(named[:2], subspace, total_steps=1)
    with pytest.raises(ValueError, match="Got 0 parameters"):
        SubspaceOptimizer([], subspace, total_steps=1)
