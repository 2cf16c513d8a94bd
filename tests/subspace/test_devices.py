"""Under autocast, with another default device, and on devices without float64 (Apple's), for which
a class of tensors stands in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, average, build_subspace
from lightning_twa.subspace import tensors

BITS = [32, 16, 8, 4, 1]


def members(n: int = 4, width: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(width, width, generator=generator)
    return [
        {"w": base + 0.1 * torch.randn(width, width, generator=generator), "b": base[0] * i}
        for i in range(n)
    ]


def step_of(bits: int) -> tuple[Tensor, Tensor]:
    """Coefficients and parameters after two steps on fixed gradients."""
    states = members()
    params = {name: nn.Parameter(value.clone()) for name, value in states[0].items()}
    subspace = build_subspace(states, SubspaceConfig(bits=bits))
    solver = SolverConfig(lr=0.3, schedule="constant", name="sgd", momentum=0.0)
    optimizer = SubspaceOptimizer(params.items(), subspace, solver)
    for i in range(2):
        for name, parameter in params.items():
            parameter.grad = states[i + 1][name] - states[3][name]
        optimizer.step()
    return optimizer.coefficients, torch.cat([p.detach().reshape(-1) for p in params.values()])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_that_without(bits, dtype) -> None:
    plain = step_of(bits)
    with torch.autocast("cpu", dtype=dtype):
        mixed = step_of(bits)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


def steps_on(device: torch.device, config: SubspaceConfig) -> list[Tensor]:
    """Averaging weights and parameters after three steps with this default device."""
    states = members()
    params = {name: nn.Parameter(value.clone()) for name, value in states[0].items()}

    def closure() -> Tensor:
        terms = [(p - states[3][name]).square().sum() for name, p in params.items()]
        loss = terms[0] + terms[1]
        for parameter in params.values():
            parameter.grad = None
        loss.backward()
        return loss

    solver = SolverConfig(lr=None if config.basis == "pca" else 0.1)
    with device:
        subspace = build_subspace(states, config)
        optimizer = SubspaceOptimizer(params.items(), subspace, solver, total_steps=3)
        for _ in range(3):
            optimizer.step(closure)
        again = SubspaceOptimizer(params.items(), subspace, solver, total_steps=3)
        again.load_state_dict(optimizer.state_dict())
        return [again.averaging_weights, *(p.detach().clone() for p in params.values())]


@pytest.mark.matrix(18)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("basis", ["pca", "candidates", "orthonormal"])
@pytest.mark.parametrize("parametrization", ["free", "simplex", "mask"])
def test_another_default_device_changes_nothing(bits, basis, parametrization) -> None:
    if parametrization != "free" and basis != "candidates":
        pytest.skip("averaging weights are parametrized in that basis only")
    mask = {"mask_size": 2} if parametrization == "mask" else {}
    config = SubspaceConfig(bits=bits, basis=basis, parametrization=parametrization, **mask)
    found = [steps_on(torch.device(device), config) for device in ("cpu", "meta")]
    assert all(tensor.device.type == "cpu" for tensor in found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class OnApple(Tensor):
    """A tensor that cannot be in float64 until it has gone to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return result.as_subclass(Tensor)
        for tensor in torch.utils._pytree.tree_leaves(result):
            wide = isinstance(tensor, OnApple) and tensor.dtype == torch.float64
            assert not wide, f"{func}: float64, of which there is none"
        return result


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tensors, "WITHOUT_FLOAT64", {"cpu"})
    return lambda tensor: tensor.clone().as_subclass(OnApple)


def test_the_stand_in_for_apples_device_notices_float64(apple) -> None:
    part = apple(torch.ones(3))
    for wrong in (Tensor.double, lambda t: t.to(device="cpu", dtype=torch.float64)):
        with pytest.raises(AssertionError, match="of which there is none"):
            wrong(part)
    assert type(part.cpu().double()) is Tensor


@pytest.mark.parametrize("bits", BITS)
def test_products_on_a_device_without_float64(apple, bits) -> None:
    states = members()
    subspace = build_subspace(states, SubspaceConfig(bits=bits, blocks="tensor"))
    generator = torch.Generator().manual_seed(5)
    shapes = [spec.shape for spec in subspace.layout.specs]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    plain, stored = subspace.project(gradients), subspace.stored
    out = [torch.empty(shape) for shape in shapes]
    subspace.expand(plain, out)
    subspace.center = apple(subspace.center)
    if bits > 8:
        stored.rows = apple(stored.rows)
    else:
        stored.planes = tuple(apple(plane) for plane in stored.planes)
        stored.scales = apple(stored.scales)
    found = subspace.project([apple(gradient) for gradient in gradients])
    assert found.dtype == torch.float32
    assert torch.equal(found.as_subclass(Tensor), plain)
    there = [apple(torch.empty(shape)) for shape in shapes]
    subspace.expand(found, there)
    for a, b in zip(out, there, strict=True):
        assert torch.equal(a, b.as_subclass(Tensor))


def test_averages_of_weights_on_a_device_without_float64(apple) -> None:
    states = [{name: apple(value) for name, value in state.items()} for state in members()]
    result = average(states)
    for name, value in average(members()).items():
        assert torch.equal(result[name].as_subclass(Tensor), value)
        assert result[name].dtype == torch.float32
