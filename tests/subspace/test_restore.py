"""A subspace that is made again from what it stored, without the candidates."""

from __future__ import annotations

import pytest
import torch
from reference import BASES

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace import (
    Columns,
    ParameterLayout,
    cut_evenly,
    held_everywhere,
    restore_subspace,
)

LAYOUT = ParameterLayout.from_tensors(
    {"a.weight": torch.zeros(150, 170), "b.bias": torch.zeros(33)}, "tensor"
)
CUTS = {"all columns": held_everywhere(LAYOUT, 0, 1), "a share": cut_evenly(LAYOUT, 2)[1]}


def members(n: int = 4, still: bool = False) -> list[dict[str, torch.Tensor]]:
    """Candidates; on request in some columns of all of them the same."""
    found = [{spec.name: torch.randn(spec.shape) for spec in LAYOUT.specs} for _ in range(n)]
    for member in found * still:
        member["a.weight"][140:] = 1.0
    return found


@pytest.mark.parametrize("own_start", [False, True])
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("columns", [*CUTS.values()], ids=[*CUTS])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 16, 32])
@BASES
@pytest.mark.matrix(40)
def test_it_is_the_same_bit_by_bit(
    name: str, bits: int, columns: Columns, still: bool, own_start: bool
) -> None:
    config = SubspaceConfig(basis=name, bits=bits, blocks="tensor")
    start = members(1)[0] if own_start else None
    built = build_subspace(members(still=still), config, columns=columns, start=start)
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    again = restore_subspace(
        state, config, columns, built.mixing, starts_at_mean=built.starts_at_mean
    )
    assert repr(again) == repr(built)
    assert torch.equal(again.center, built.center)
    assert torch.equal(again.directions, built.directions)
    assert again.state_dict().keys() == state.keys()
    shapes = [spec.shape for spec in columns.local.specs]
    gradients = [torch.randn(shape) for shape in shapes]
    assert torch.equal(again.project(gradients), built.project(gradients))
    x = torch.randn(built.num_directions, built.num_blocks)
    assert torch.equal(again.averaging_weights(x), built.averaging_weights(x))
    found = [[torch.empty(shape) for shape in shapes] for _ in range(2)]
    for subspace, out in zip((built, again), found, strict=True):
        subspace.expand(x, out)
    assert all(map(torch.equal, *found))
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(again.directions, built.directions), "it has tensors of its own"


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("how", ["missing", "shape", "dtype"])
def test_what_is_of_another_subspace_is_an_error(bits: int, how: str) -> None:
    config, columns = SubspaceConfig(bits=bits, blocks="tensor"), CUTS["all columns"]
    built = build_subspace(members(), config, columns=columns)
    for name in built.state_dict():
        state = dict(built.state_dict())
        tensor = state.pop(name)
        if how == "shape":
            state[name] = tensor.new_zeros(*tensor.shape, 2)
        elif how == "dtype":
            state[name] = tensor.to(torch.int16)
        with pytest.raises(ValueError, match=f"ensor '{name}'"):
            restore_subspace(state, config, columns, built.mixing, starts_at_mean=True)


def test_in_float64() -> None:
    config = SubspaceConfig()
    doubled = [{name: tensor.double() for name, tensor in m.items()} for m in members()]
    columns = held_everywhere(ParameterLayout.from_tensors(doubled[0]), 0, 1)
    built = build_subspace(doubled, config, columns=columns)
    state = built.state_dict()
    again = restore_subspace(state, config, columns, built.mixing, starts_at_mean=True)
    assert again.center.dtype == built.center.dtype == torch.float64
    assert torch.equal(again.directions, built.directions)


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_it_may_have_the_tensors_of_the_state(bits: int) -> None:
    """Which nothing writes to; those that are not aligned as torch's own are copied."""
    config, columns = SubspaceConfig(bits=bits, blocks="tensor"), CUTS["all columns"]
    built = build_subspace(members(), config, columns=columns)
    for offset in (0, 4):
        state = {}
        for name, tensor in built.state_dict().items():
            space = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
            start = -space.data_ptr() % 64 + (8 if name == "error" else offset)
            view = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            state[name] = view.copy_(tensor)
        before = {name: tensor.clone() for name, tensor in state.items()}
        again = restore_subspace(
            state, config, columns, built.mixing, starts_at_mean=True, shares=True
        )
        held = again.state_dict()
        shared = {n for n in held if held[n].data_ptr() == state[n].data_ptr()}
        assert shared == (set() if offset else held.keys() - {"error"})
        gradients = [torch.randn(spec.shape) for spec in LAYOUT.specs]
        assert torch.equal(again.project(gradients), built.project(gradients))
        out = [torch.empty(spec.shape) for spec in LAYOUT.specs]
        again.expand(torch.randn(again.num_directions, again.num_blocks), out)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
