"""Entries that are the same in all candidates: no basis moves them, whatever its bits."""

from __future__ import annotations

import pytest
import torch
from reference import candidates, check_products
from torch import Tensor, nn

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace.directions import TILE, packed

SIZE = 3 * TILE + 77
STILL = {
    "one": [5],
    "some": [0, 3, 64, 127, 128, TILE - 1, TILE, SIZE - 1],
    "half": list(range(0, SIZE, 2)),
    "a group": list(range(128, 256)),
    "a tile": list(range(TILE, 2 * TILE)),
    "the last": list(range(3 * TILE, SIZE)),
}


def members(still: list[int], n: int = 5) -> list[dict[str, Tensor]]:
    found = candidates(n, shapes={"w": (SIZE,), "all still": (50,), "v": (130,)})
    for member in found[1:]:
        member["w"][still] = found[0]["w"][still]
        member["all still"] = found[0]["all still"].clone()
    return found


@pytest.mark.matrix(34)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("which", STILL)
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_a_step_does_not_move_them(bits, which, blocks) -> None:
    still = STILL[which]
    states = members(still)
    params = {name: nn.Parameter(value.clone()) for name, value in states[2].items()}
    subspace = build_subspace(states, SubspaceConfig(bits=bits, blocks=blocks))
    optimizer = SubspaceOptimizer(params.items(), subspace, SolverConfig(radius=3), total_steps=4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in params.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert torch.equal(params["w"].detach()[still], states[0]["w"][still])
    assert torch.equal(params["all still"].detach(), states[0]["all still"])
    mean = torch.stack([state["v"] for state in states]).mean(dim=0)
    assert float((params["v"].detach() - mean).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")  # torch's own while compiling
@pytest.mark.parametrize(
    ("bits", "path"),
    [(1, "tiled"), (3, "tiled"), (4, "tiled"), (8, "tiled"), (4, "compiled"),
     *(pytest.param(b, "compiled", marks=pytest.mark.long) for b in (1, 3, 8))],
)  # fmt: skip
def test_products_leave_them_out(bits, path, monkeypatch) -> None:
    monkeypatch.setattr(packed, "COMPILE_ENTRIES", 0 if path == "compiled" else 1 << 40)
    monkeypatch.setitem(packed.CHUNK_TILES, "cpu", 2)
    still = STILL["some"]
    subspace = build_subspace(members(still), SubspaceConfig(bits=bits))
    assert subspace.stored.path == path
    directions = subspace.directions
    assert not directions[:, still].any()
    assert not directions[:, SIZE : SIZE + 50].any()
    check_products(subspace)
    assert subspace.stored.path == path, "compiling failed and the test saw the fallback"
    gradients = [torch.zeros(spec.shape) for spec in subspace.layout.specs]
    before = subspace.project(gradients)
    gradients[0][still] = 1e3
    gradients[1].fill_(1e3)
    assert torch.equal(subspace.project(gradients), before)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_error_counts_what_is_stored(bits) -> None:
    states = members(STILL["half"])
    subspace = build_subspace(states, SubspaceConfig(bits=bits))
    exact, stored = build_subspace(states).directions.double(), subspace.directions.double()
    error = float((stored - exact).norm() / exact.norm())
    assert subspace.stored.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 4, 16, 32])
def test_weights_that_are_pruned_stay_pruned(bits) -> None:
    """Of each tensor half is zero, in all candidates."""
    found = candidates(4, shapes={"a": (40, 33), "b": (7,)})
    masks = {n: torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) < 0.5
             for n, t in found[0].items()}  # fmt: skip
    for member in found:
        for name, tensor in member.items():
            tensor[masks[name]] = 0.0
    params = {name: nn.Parameter(value.clone()) for name, value in found[0].items()}
    subspace = build_subspace(found, SubspaceConfig(bits=bits))
    optimizer = SubspaceOptimizer(params.items(), subspace, total_steps=2)
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in params.items():
        assert not parameter.detach()[masks[name]].any()
