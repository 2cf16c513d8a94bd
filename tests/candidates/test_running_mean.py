"""The average that is validated, from the sum of before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa.candidates import RunningMean, Store, drop, running_mean
from lightning_twa.candidates.into_model import mean_parameters


def net() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    module[1].bias.requires_grad_(False)
    return module


def take(store: Store, module: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_().mul_(10.0 ** torch.randint(-3, 4, ()).item())
    store.add(module, f"step={step}")


def expected(store: Store) -> dict[str, Tensor]:
    """In float64, the plain way."""
    members = [candidate.parameters for candidate in store]
    return {n: torch.stack([m[n].double() for m in members]).mean(0) for n in members[0]}


@pytest.mark.parametrize("evenly", [True, False])
@pytest.mark.parametrize("most", [None, 4])
def test_means_are_those_of_all_candidates(most: int | None, evenly: bool) -> None:
    store, module, mean = Store(max_candidates=most, evenly=evenly), net(), RunningMean()
    for step in range(0, 60, 5):
        take(store, module, step)
        if step % 3 == 0:  # not after each
            continue
        now = {name: value.double().clone() for name, value in mean.parameters(store)}
        assert equal(now, dict(mean_parameters(store))), "bit for bit"
        for name, value in expected(store).items():
            torch.testing.assert_close(now[name], value, rtol=1e-13, atol=1e-13)


class Wide(TorchDispatchMode):
    """Counts tensors that are read into float64."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        to = (kw or {}).get("dtype")
        self.read += function is torch.ops.aten._to_copy.default and to == torch.float64
        return function(*args, **(kw or {}))


def test_a_mean_reads_what_has_come_since() -> None:
    store, module, mean = Store(), net(), RunningMean()
    for step in range(20):
        take(store, module, step)
        with Wide() as wide:
            dict(mean.parameters(store))
        # two at most are new, with the first one beside each and in the result
        assert wide.read <= 3 * 5
    with Wide() as wide:
        dict(mean_parameters(store))
    assert wide.read == 4 * 20


def test_a_new_window_begins_anew() -> None:
    """Names come again."""
    store, module, mean = Store(), net(), RunningMean()
    for _ in range(2):
        for step in range(5):
            take(store, module, step)
            now = {name: value.double().clone() for name, value in mean.parameters(store)}
            assert equal(now, dict(mean_parameters(store)))
        store.clear()
    for step in range(5):
        take(store, module, step)
    dict(mean.parameters(store))
    drop(store, ["step=1"])
    now = {name: value.double().clone() for name, value in mean.parameters(store)}
    assert equal(now, dict(mean_parameters(store)))


def test_one_that_was_not_read_to_its_end_begins_anew() -> None:
    store, module, mean = Store(), net(), RunningMean()
    for step in range(4):
        take(store, module, step)
    dict(mean.parameters(store))
    take(store, module, 4)
    next(iter(mean.parameters(store)))
    now = {name: value.double().clone() for name, value in mean.parameters(store)}
    assert equal(now, dict(mean_parameters(store)))


def test_what_is_frozen_takes_no_memory_and_infinities_stay() -> None:
    store, module, mean = Store(), net(), RunningMean()
    with torch.no_grad():
        module[1].bias[0] = torch.inf
    for step in range(4):
        take(store, module, step)
        means = dict(mean.parameters(store))
    assert means["1.bias"] is next(iter(store)).parameters["1.bias"]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert mean.nbytes == 8 * trained
    mean.clear()
    assert mean.nbytes == 0


def test_without_room_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store, module, mean = Store(), net(), RunningMean()
    size = sum(p.numel() for p in module.parameters())
    for step in range(4):
        take(store, module, step)
    monkeypatch.setattr(running_mean, "free_bytes", lambda device: 32 * size - 1)
    now = {name: value.double().clone() for name, value in mean.parameters(store)}
    assert mean.nbytes == 0
    assert equal(now, dict(mean_parameters(store)))
    monkeypatch.setattr(running_mean, "free_bytes", lambda device: 32 * size)
    dict(mean.parameters(store))
    assert mean.nbytes > 0
    assert copy.deepcopy(mean).nbytes == 0


def test_a_run_is_the_same_and_keeps_no_sum_in_the_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kept = Regressor(batchnorm=True), []

    def run(module: Any) -> Any:
        collect = CollectConfig(start=0, max_candidates=3, keep="evenly")
        twa = TWACallback(start_epoch=6, validate_average=True, collect=collect)
        the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=8)
        the_trainer.fit(module, loader(), loader(32, seed=1))
        kept.append(twa._run.averaging.temporary._mean.nbytes)
        return float(the_trainer.callback_metrics["val_loss"]), state(module)

    usual = run(copy.deepcopy(module))
    monkeypatch.setattr(RunningMean, "parameters", lambda _, *a: mean_parameters(*a))
    assert equal(usual, run(module))
    assert kept == [0, 0]
