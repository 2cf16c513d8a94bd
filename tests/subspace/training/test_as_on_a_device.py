"""What an accelerator does, done by the CPU, which has values: each step is the CPU's own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from reference import BLOCKS, F32, F64, SOLVERS, candidates, check_products, members, net_members
from torch import Tensor, nn

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.machine import CommonError
from lightning_twa.subspace import FullMatrixAdam, tensors
from lightning_twa.subspace.directions import kernels, packed, rows
from lightning_twa.subspace.training import exchange
from lightning_twa.subspace.training.inverse_root import InverseRoot, newton_schulz
from lightning_twa.subspace.training.solvers import _precondition


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on the CPU is an accelerator."""
    plain = (kernels.project_at_once, kernels.expand_at_once)

    def begin(compiled: Any = plain) -> None:
        monkeypatch.setattr(tensors, "HOSTS", set())
        monkeypatch.setattr(kernels, "COMPILES", {"cpu"})
        monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: compiled)
        monkeypatch.setattr(rows, "compiled_rows", lambda: (rows.project_rows, rows.expand_rows))

    return begin


# --- products


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 3, 1])
@pytest.mark.parametrize("blocks", ["global", "tensor", 500])
def test_products_are_the_float64_reference(device, bits, blocks, monkeypatch) -> None:
    device()
    check_products(build_subspace(candidates(), SubspaceConfig(bits=bits, blocks=blocks)))
    monkeypatch.setattr(packed, "TILES_PER_CALL", 1)
    monkeypatch.setattr(packed, "CALLS", 3)
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits, blocks=blocks))
    check_products(subspace)
    if bits <= 8:
        assert len(subspace.stored._chunks) == 3
        assert subspace.stored.path == "compiled"


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_parameters_and_gradients_of_any_layout_and_dtype(device, bits) -> None:
    shapes = {"conv": (8, 4, 3, 3), "w": (60, 50), "none": (0, 3), "b": (5,)}
    states = candidates(shapes=shapes)
    found = []
    for on_device in (False, True):
        if on_device:
            device()
        subspace = build_subspace(states, SubspaceConfig(bits=bits, blocks="tensor"))
        out = [
            torch.zeros(shapes["conv"]).contiguous(memory_format=torch.channels_last),
            torch.zeros(50, 60, dtype=torch.bfloat16).T,
            torch.zeros(0, 3),
            torch.zeros(5),
        ]
        torch.manual_seed(0)
        gradients = [torch.randn_like(t) for t in out]
        gradients[3] = None
        found.append((subspace.project(gradients), out))
        subspace.expand(torch.full((5, 4), 0.1), out)
    (first, theta), (second, other) = found
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    for a, b in zip(theta, other, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
        assert a.stride() == b.stride()


def broken(*args: Any) -> Tensor:
    raise RuntimeError("no C++ compiler")


@pytest.mark.parametrize("bits", [16, 4])
def test_what_cannot_be_compiled_is_tiled_with_one_warning(device, bits, monkeypatch) -> None:
    device((broken, broken))
    monkeypatch.setattr(rows, "compiled_rows", lambda: (broken, broken))
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits))
    with pytest.warns(UserWarning, match="could not be compiled.*no C") as caught:
        check_products(subspace)
    assert len(caught) == 1


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_memory_that_is_used_up_is_no_failure_of_compiling(
    device, bits, nested, monkeypatch
) -> None:
    def full(*args: Any) -> Tensor:
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        except torch.cuda.OutOfMemoryError as error:
            if nested:
                raise RuntimeError("backend failed") from error
            raise

    device((full, full))
    monkeypatch.setattr(rows, "compiled_rows", lambda: (full, full))
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"out of memory|backend failed"):
            check_products(subspace)


def test_a_kernel_that_has_worked_is_not_given_up(device) -> None:
    device()
    subspace = build_subspace(candidates(), SubspaceConfig(bits=4))
    check_products(subspace)
    device((broken, broken))
    with pytest.raises(RuntimeError, match="no C"):
        check_products(subspace)
    assert subspace.stored.path == "compiled"


# --- the inverse root


@pytest.mark.parametrize("k", [1, 2, 14, 60])
@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-10), (F32, 2e-2)])
def test_the_inverse_root_is_that_of_an_eigendecomposition(k, dtype, limit) -> None:
    root = InverseRoot(torch.empty(k, 1, dtype=dtype), 1e-3)
    for steps in (1, 3, 40):
        g = torch.randn(4, k, steps, dtype=F64) * torch.randn(k, 1, dtype=F64).exp() ** 3 * 1e-4
        second, mean = g @ g.mT, g.sum(-1).T.contiguous()
        exact = _precondition(second, mean, 1e-3)
        direction, size = root(second.to(dtype), mean.to(dtype))
        found = direction.double() * size.double() * root.factor
        assert float((found - exact).norm() / exact.norm()) < limit
    direction, size = root(torch.zeros(2, k, k, dtype=dtype), torch.zeros(k, 2, dtype=dtype))
    assert bool((direction * size == 0).all())


def test_the_cubics_take_their_interval_to_one() -> None:
    for low in (0.9, 0.1, 1e-4):
        s = torch.logspace(torch.log10(torch.tensor(low)).item(), 0, 500, dtype=F64)
        for c, d in newton_schulz(low, 1e-13):
            s = c * s + d * s**3
            assert float(s.max()) <= 1 + 1e-12
        torch.testing.assert_close(s, torch.ones_like(s), rtol=1e-12, atol=0)


def test_without_a_ridge_there_is_none() -> None:
    with pytest.raises(ValueError, match="ridge=0"):
        InverseRoot(torch.empty(3, 1), 0.0)


# --- steps


def phase(
    solver: SolverConfig, config: SubspaceConfig, steps: int = 12, bad: tuple[int, ...] = ()
) -> SubspaceOptimizer:
    """Steps on a fixed quadratic; in some of them the gradient is not finite."""
    torch.manual_seed(5)
    net, ms = net_members()
    optimizer = SubspaceOptimizer(
        net.named_parameters(), build_subspace(ms, config), solver, total_steps=steps
    )
    inputs = torch.randn(steps, 8, 5, dtype=F64)
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = net(inputs[step]).square().mean()
            loss.backward()
            if step in bad:
                for parameter in net.parameters():
                    parameter.grad.fill_(torch.nan)
            return loss

        optimizer.step(closure)
    return optimizer


def same(a: SubspaceOptimizer, b: SubspaceOptimizer, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(a.raw, b.raw, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(a.path_length, b.path_length, rtol=rtol, atol=1e-9)
    assert (a.steps, a.skipped_steps, a.last_lr) == (b.steps, b.skipped_steps, b.last_lr)
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@BLOCKS
def test_a_phase_is_the_cpu_s(device, solver, blocks) -> None:
    config = SolverConfig(**SOLVERS[solver])
    plain = phase(config, SubspaceConfig(blocks=blocks))
    device()
    same(phase(config, SubspaceConfig(blocks=blocks)), plain)


@pytest.mark.parametrize("parametrization", ["simplex", "mask"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.2])
def test_so_is_one_of_averaging_weights(device, parametrization, sam_rho) -> None:
    config = SubspaceConfig(parametrization=parametrization, blocks="tensor")
    solver = SolverConfig(sam_rho=sam_rho)
    plain = phase(solver, config)
    device()
    same(phase(solver, config), plain, rtol=1e-6)


@pytest.mark.parametrize("solver", ["default", "adamw", "sgd"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(device, solver) -> None:
    device()
    optimizer = phase(SolverConfig(**SOLVERS[solver]), SubspaceConfig(), steps=4, bad=(0, 1, 2))
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    kept = optimizer.state_dict()
    assert (optimizer.steps, optimizer.skipped_steps, optimizer.attempts) == (1, 3, 4)
    assert bool(optimizer.raw.isfinite().all())
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    now = optimizer.state_dict()
    for key in ("coefficients", "path_length"):
        assert torch.equal(kept[key], now[key])
    for key, value in kept["solver"]["state"][0].items():
        assert key == "step" or torch.equal(value, now["solver"]["state"][0][key])
    for p, q in zip(before, optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    with pytest.warns(UserWarning, match=r"steps before 5 of the TWA phase .* \(4 so far\)"):
        optimizer.look()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.look()


@pytest.mark.parametrize("solver", ["default", "adamw", "sgd"])
def test_a_state_goes_from_one_kind_of_device_to_the_other(device, solver) -> None:
    config = SolverConfig(**SOLVERS[solver])
    whole = phase(config, SubspaceConfig())

    def resumed(state: dict[str, Any] | None, steps: int) -> Any:
        torch.manual_seed(5)
        net, ms = net_members()
        optimizer = SubspaceOptimizer(
            net.named_parameters(), build_subspace(ms), config, total_steps=12
        )
        inputs = torch.randn(12, 8, 5, dtype=F64)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(optimizer.steps, optimizer.steps + steps):
            optimizer.zero_grad()
            net(inputs[step]).square().mean().backward()
            optimizer.step()
        return optimizer

    first = resumed(None, 4).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "HOSTS", set())
        second = resumed(first, 4).state_dict()
    assert all(t.dtype == F32 for t in [second["solver"]["state"][0].get("step", torch.zeros(1))])
    same(resumed(second, 4), whole)


# --- several processes


def test_a_process_that_fails_is_heard_of_when_all_look(device, monkeypatch) -> None:
    ms = members(4)
    device()
    subspace = build_subspace(ms)
    params = [nn.Parameter(t.clone()) for t in ms[0].values()]
    optimizer = SubspaceOptimizer(
        params, subspace, total_steps=4, exchange=exchange.Replicate(torch.device("cpu"))
    )
    sent = []
    monkeypatch.setattr(exchange, "sum_over_ranks", lambda m, device: sent.append(m.clone()) or m)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.look()
    plain, before = subspace.project, optimizer.raw.clone()
    monkeypatch.setattr(subspace, "project", lambda gradients: 1 / 0)
    optimizer.step()
    assert bool(sent[-1].isnan().all()), "the others must not take the step either"
    assert torch.equal(optimizer.raw, before)
    monkeypatch.setattr(subspace, "project", plain)
    optimizer.step()
    with pytest.raises(CommonError, match=r"could not be projected \(ZeroDivisionError"):
        optimizer.look()
    monkeypatch.setattr(exchange, "sum_over_ranks", lambda m, device: m * torch.nan)
    optimizer.step()
    with pytest.raises(CommonError, match="another process"):
        optimizer.look()


def test_without_any_gradient_on_any_process_nothing_moves(device, monkeypatch) -> None:
    ms = members(4)
    device()
    params = [nn.Parameter(t.clone()) for t in ms[0].values()]
    how = exchange.Replicate(torch.device("cpu"))
    optimizer = SubspaceOptimizer(params, build_subspace(ms), total_steps=4, exchange=how)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.steps == 0
    assert all(map(torch.equal, before, params))


def test_a_copy_of_the_solver_steps_on(device) -> None:
    device()
    solvers = []
    for copied in (False, True):
        x = nn.Parameter(torch.zeros(4, 2, dtype=F64))
        solver = FullMatrixAdam([x], lr=0.1)
        torch.manual_seed(1)
        for step in range(4):
            if copied and step == 2:
                solver = copy.deepcopy(solver)
                (x,) = solver.param_groups[0]["params"]
            x.grad = torch.randn(4, 2, dtype=F64)
            solver.step()
        solvers.append(x.detach())
    assert torch.equal(*solvers)


# --- a real one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
@pytest.mark.parametrize("parametrization", ["free", "simplex", "mask"])
def test_a_step_on_cuda_waits_for_nothing_and_is_the_cpu_s(bits, blocks, parametrization) -> None:
    states = candidates()
    config = SubspaceConfig(bits=bits, blocks=blocks, parametrization=parametrization)
    phases = []
    for name in ("cpu", "cuda"):
        params = {k: nn.Parameter(v.to(name)) for k, v in states[0].items()}
        optimizer = SubspaceOptimizer(
            params.items(), build_subspace(states, config, device=name), total_steps=6
        )

        for step in range(6):
            target = {k: (states[1 + step % 3][k] - states[0][k]).to(name) for k in states[0]}

            def closure(params: Any = params, target: Any = target) -> None:
                for k, p in params.items():
                    p.grad = target[k].clone()

            torch.cuda.set_sync_debug_mode("error" if name == "cuda" and step > 1 else "default")
            try:
                optimizer.step(closure)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        phases.append(optimizer)
    if parametrization != "mask":  # whose noise is the device's own
        torch.testing.assert_close(phases[1].raw.cpu(), phases[0].raw, rtol=1e-3, atol=1e-4)
