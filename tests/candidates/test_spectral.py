"""Singular vectors of spectral normalisation fit averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from lightning_twa import SolverConfig, StorageConfig, average
from lightning_twa.candidates import fit_singular_vectors_

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 9),
    "square": lambda: nn.Linear(7, 7),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3),
    "transposed square": lambda: nn.ConvTranspose1d(4, 4, 2),
}


def wrapped(way: str, layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return WAYS[way](layer)


def parts(layer: nn.Module) -> list[Tensor]:
    """Weight, ``u`` and ``v``, which share the layer's memory."""
    state = layer.state_dict()
    hooked = ("weight_orig", "weight_u", "weight_v")
    own = tuple(f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v"))
    return [state[name] for name in (hooked if "weight_orig" in state else own)]


def sigma(layer: nn.Module) -> tuple[float, float]:
    """The norm that the layer divides by, and the true one in float64."""
    weight, u, v = (tensor.double() for tensor in parts(layer))
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    matrix = weight.movedim(dim, 0).flatten(1)
    return float(u @ matrix @ v), float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_vectors_of_a_changed_weight_are_those_of_the_weight(way, kind, dtype) -> None:
    layer = wrapped(way, LAYERS[kind]()).to(dtype)
    tensors = layer.state_dict()
    weight, u, v = parts(layer)
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    left, _, right = torch.linalg.svd(weight.double().movedim(dim, 0).flatten(1))
    u.copy_(left[:, 0])
    v.copy_(right[0])
    before = {name: value.clone() for name, value in tensors.items()}
    weight.add_(0.3 * torch.randn_like(weight))
    assert len(fit_singular_vectors_(tensors, before)) == 2
    found, true = sigma(layer)
    assert found == pytest.approx(true, rel=2e-2 if dtype == torch.bfloat16 else 1e-3)


def test_what_is_no_spectral_norm_and_a_weight_of_zeros_stay() -> None:
    layer = wrapped("hook", nn.Linear(3, 4))
    others = {"a_orig": torch.ones(2, 3), "a_u": torch.ones(5), "a_v": torch.ones(3)}
    before = {name: value.clone() for name, value in others.items()}
    assert fit_singular_vectors_(others, {}) == []
    assert equal(others, before)
    tensors = dict(layer.state_dict())
    tensors["weight_orig"].zero_()
    before = {name: value.clone() for name, value in tensors.items()}
    fit_singular_vectors_(tensors, {})
    assert equal(tensors, before)


def test_vectors_that_were_averaged_to_nothing_begin_anew() -> None:
    layer = wrapped("hook", nn.Linear(6, 6))
    tensors = layer.state_dict()
    tensors["weight_u"].zero_()
    tensors["weight_v"].zero_()
    fit_singular_vectors_(tensors, {})
    found, true = sigma(layer)
    assert found == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("method", ["uniform", "ema", "weights", "greedy"])
@pytest.mark.parametrize("way", WAYS)
def test_averages_of_state_dicts_fit(way, method) -> None:
    layers = [wrapped(way, nn.Linear(6, 8)) for _ in range(3)]
    states = [layer.state_dict() for layer in layers]
    options: dict[str, Any] = {
        "ema": {"decay": 0.5},
        "weights": {"weights": [0.5, 0.3, 0.2]},
        "greedy": {"score": lambda state: 1.0},
    }
    layers[0].load_state_dict(average(states, method, **options.get(method, {})))
    found, true = sigma(layers[0])
    assert found == pytest.approx(true, rel=1e-3)


def test_equal_states_stay_as_they_are() -> None:
    state = wrapped("hook", nn.Linear(6, 8)).state_dict()
    assert equal(average([state, state]), dict(state))


class Normed(Regressor):
    def __init__(self, way: str) -> None:
        super().__init__(lr=0.2)
        self.net[0] = wrapped(way, self.net[0])
        self.net[2] = wrapped(way, nn.Linear(8, 1))


class Looks(L.Callback):
    """The relative error of the norm in each validation."""

    def __init__(self, twa: TWACallback) -> None:
        self.twa = twa
        self.errors: list[tuple[str, float]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        found, true = sigma(pl_module.net[0])
        self.errors.append((self.twa.phase, abs(found / true - 1)))


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "validated": {"validate_average": True},
    "disk": {"storage": StorageConfig(kind="disk")},
    "cycles": {"start_epoch": 2, "cycles": 2},
}


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_averages_of_a_run_fit(tmp_path, way, kind) -> None:
    L.seed_everything(1, verbose=False)
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    looks, module = Looks(twa), Normed(way)
    trainer(tmp_path, callbacks=[looks, twa], max_epochs=8).fit(
        module, loader(), loader(32, seed=1)
    )
    found, true = sigma(module.net[0])
    assert found == pytest.approx(true, rel=1e-3)
    assert max(error for phase, error in looks.errors if phase != "collect") < 1e-2
    if hasattr(module.net[0], "parametrizations"):
        assert parametrize.is_parametrized(module.net[0])


def test_the_iteration_needs_no_gradient() -> None:
    layer = wrapped("parametrization", nn.Linear(4, 4))
    own: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    fit_singular_vectors_(own, {})
    assert not any(t.requires_grad for t in dict(layer.named_buffers()).values())
