"""Phases on a simulated device, whose tensors have values and mix with no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import SOLVERS, candidates
from torch import Tensor, nn

from helpers.simulated import DEVICE, Simulated, There
from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace.directions import kernels, rows


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (kernels.project_at_once, kernels.expand_at_once)
    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: plain)
    monkeypatch.setattr(rows, "compiled_rows", lambda: (rows.project_rows, rows.expand_rows))


def host(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, There) else tensor


def phase(
    states: Any, config: SubspaceConfig, solver: SolverConfig, device: torch.device | str
) -> tuple[list[Tensor], Tensor]:
    """Five steps with fixed gradients: the parameters, and the averaging weights."""
    subspace = build_subspace(states, config, device=device)
    there = device == DEVICE
    params = {
        k: nn.Parameter(v.clone().to(DEVICE) if there else v.clone()) for k, v in states[0].items()
    }
    optimizer = SubspaceOptimizer(params.items(), subspace, solver, total_steps=5)
    generator = torch.Generator().manual_seed(3)

    def closure() -> None:
        for parameter in params.values():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(DEVICE) if there else gradient

    for _ in range(5):
        optimizer.step(closure)
    state = optimizer.state_dict()
    assert all(type(t) is Tensor for t in state.values() if isinstance(t, Tensor))
    return [host(p).detach() for p in params.values()], host(optimizer.averaging_weights)


@pytest.mark.matrix(14)
@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_phase_on_a_device_is_that_of_the_cpu(bits, blocks, solver) -> None:
    states, config = candidates(), SubspaceConfig(bits=bits, blocks=blocks)
    plain = phase(states, config, SolverConfig(**SOLVERS[solver]), "cpu")
    with Simulated():
        found = phase(states, config, SolverConfig(**SOLVERS[solver]), DEVICE)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found[0], plain[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_so_is_one_of_averaging_weights(bits, sam_rho) -> None:
    states, config = candidates(), SubspaceConfig(bits=bits, parametrization="simplex")
    solver = SolverConfig(sam_rho=sam_rho)
    plain = phase(states, config, solver, "cpu")
    with Simulated():
        found = phase(states, config, solver, DEVICE)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)
