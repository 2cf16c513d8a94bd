"""Averages on a simulated device are those of the CPU, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.simulated import DEVICE, Simulated, There
from lightning_twa.candidates import (
    PowerAverages,
    RunningMean,
    Store,
    copying,
    put_average,
    put_weighted,
)
from lightning_twa.candidates.running_averages import RunningAverages
from lightning_twa.subspace import ParameterLayout

SHAPES = {"large": (300, 301), "small": (7, 3), "bias": (5,)}


class Net(nn.Module):
    def __init__(self, *, there: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator)
            setattr(self, name, nn.Parameter(value.to(DEVICE) if there else value))
        buffer = torch.randn(4, generator=generator)
        self.register_buffer("mean", buffer.to(DEVICE) if there else buffer)

    def values(self) -> dict[str, Tensor]:
        return {name: host(t).detach().clone() for name, t in self.state_dict().items()}


def host(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, There) else tensor


@torch.no_grad()
def run(follow: Any, *, there: bool) -> Net:
    """Ten steps; after each something is done with the net."""
    net, generator = Net(there=there), torch.Generator().manual_seed(1)
    for step in range(10):
        for parameter in net.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter.add_(change.to(DEVICE) if there else change)
        follow(net, step)
    return net


def both(what: Any) -> tuple[Any, Any]:
    plain = what(there=False)
    with Simulated():
        return plain, what(there=True)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PLAIN", (Tensor, nn.Parameter, There))


def check(plain: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert plain.keys() == found.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, host(found[name])), name


@pytest.mark.parametrize("interval", [1, 3])
def test_power_averages(interval) -> None:
    def averages(*, there: bool) -> Any:
        power = PowerAverages((0.1, 0.2), interval)
        run(lambda net, step: power.update(net), there=there)
        return power.weights()

    plain, found = both(averages)
    assert plain.keys() == found.keys()
    for name, weights in plain.items():
        check(weights, found[name])


@pytest.mark.parametrize("place", [None, "cpu"])
def test_running_averages(place) -> None:
    def averages(*, there: bool) -> Any:
        running = RunningAverages((0.9,), place)
        run(lambda net, step: running.update(net), there=there)
        return running.weights(0)

    check(*both(averages))


@pytest.mark.parametrize("how", ["all", "sum", "weighted"])
def test_an_average_in_the_model(how) -> None:
    def averaged(*, there: bool) -> Any:
        store = Store(device=DEVICE if there else None)

        def keep(net: Net, step: int) -> None:
            if step % 3 == 0:
                store.add(net, f"step={step}")

        net = run(keep, there=there)
        if how == "weighted":
            specs = ParameterLayout.from_tensors(dict(net.named_parameters())).specs
            beta = torch.tensor([[0.5], [0.1], [-0.2], [0.6]], dtype=torch.float64)
            put_weighted(net, store, specs, beta)
        else:
            mean = RunningMean()
            put_average(net, store, None, mean.parameters(store) if how == "sum" else None)
        return net.values()

    check(*both(averaged))
