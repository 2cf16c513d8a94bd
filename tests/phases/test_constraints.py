"""Constraints on weights that a module restores after each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.common import Regressor
from helpers.short import holds_its_average, short_run, twa_of
from lightning_twa import SolverConfig, SubspaceConfig

SIMPLEX = {
    "subspace": SubspaceConfig(basis="candidates", parametrization="simplex"),
    "solver": SolverConfig(lr=0.5),
}
BOUND = 0.15


class Clamped(Regressor):
    """All weights within bounds, and the first layer's at least zero."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if twa_of(self.trainer).phase != "collect":
            return  # nothing is to be done in the phase
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-BOUND, BOUND)
            self.net[0].weight.clamp_(min=0.0)


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_a_simplex_keeps_convex_constraints(tmp_path, blocks) -> None:
    config = SubspaceConfig(basis="candidates", parametrization="simplex", blocks=blocks)
    twa, module, _ = short_run(tmp_path, Clamped, twa={**SIMPLEX, "subspace": config})
    holds_its_average(twa, module)
    assert float((twa.averaging_weights - 0.25).abs().max()) > 0.01
    for parameter in module.parameters():
        assert float(parameter.detach().abs().max()) <= BOUND * (1 + 1e-6)
    first = module.net[0].weight.detach()
    assert float(first.min()) >= -1e-7
    assert bool((first == 0).any())


def test_a_uniform_average_keeps_convex_constraints(tmp_path) -> None:
    twa = {"solver": SolverConfig(name="uniform")}
    _, module, _ = short_run(tmp_path, Clamped, twa=twa)
    for parameter in module.parameters():
        assert float(parameter.detach().abs().max()) <= BOUND * (1 + 1e-6)
    assert float(module.net[0].weight.detach().min()) >= 0
