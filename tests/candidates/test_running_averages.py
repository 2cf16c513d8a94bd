"""Running averages as candidates."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.ddp import fit, strided
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, run
from lightning_twa import StorageConfig
from lightning_twa.candidates.running_averages import RunningAverages

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


DECAYS = (0.5, 0.9, 0.99)


def reference_average(history: list[Tensor], decay: float) -> Tensor:
    """``sum_s d^(t-s) w_s / sum_s d^(t-s)`` in float64."""
    factors = [decay ** (len(history) - 1 - s) for s in range(len(history))]
    return sum(f * w.double() for f, w in zip(factors, history, strict=True)) / sum(factors)


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_an_average_is_the_weighted_mean_of_what_it_has_seen(updates) -> None:
    module = Regressor()
    averages = RunningAverages(DECAYS)
    history = []
    for _ in range(updates):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        averages.update(module)
        history.append(weights(module))
    for i, decay in enumerate(DECAYS):
        flat = torch.cat([t.double().reshape(-1) for t in averages.weights(i).values()])
        torch.testing.assert_close(flat, reference_average(history, decay), rtol=1e-5, atol=1e-5)


def test_frozen_parameters_have_no_average_and_low_precision_is_averaged_in_float32() -> None:
    module = Regressor().bfloat16()
    module.net[0].requires_grad_(False)
    averages = RunningAverages((0.999,))
    history = []
    for _ in range(200):
        averages.update(module)
        history.append(module.net[2].bias.detach().clone())
        with torch.no_grad():
            module.net[2].bias.add_(0.01)
    (found,) = [averages.weights(0)["net.2.bias"]]
    assert set(averages.weights(0)) == {"net.2.weight", "net.2.bias"}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference_average(history, 0.999))


def test_a_parameter_that_becomes_trainable_starts_with_its_value() -> None:
    module = Regressor()
    module.net[0].requires_grad_(False)
    averages = RunningAverages((0.9,))
    averages.update(module)
    module.net[0].requires_grad_(True)
    averages.update(module)
    assert torch.equal(averages.weights(0)["net.0.weight"], module.net[0].weight)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_averages_are_candidates(tmp_path, accumulate, storage) -> None:
    dirpath = str(tmp_path / "c") if storage == "disk" else None
    twa = TWACallback(
        4,
        collect=CollectConfig(start=2, max_candidates=2, ema_decays=DECAYS),
        storage=StorageConfig(kind=storage, dirpath=dirpath),
    )
    module, recorder = Regressor(batchnorm=True), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder], accumulate_grad_batches=accumulate).fit(
        module, loader()
    )
    averages = [f"ema({decay})" for decay in DECAYS]
    assert twa.candidate_names == [*averages, "epoch=2", "epoch=3"]
    assert twa.averaging_weights.shape == (5, 1)
    window = [w for phase, w in recorder.steps if phase == "collect"][8:16][
        accumulate - 1 :: accumulate
    ]
    assert len(window) == 8 // accumulate
    candidates = {c.name: c.parameters for c in twa._run.store}
    for decay in DECAYS:
        flat = torch.cat([t.double().reshape(-1) for t in candidates[f"ema({decay})"].values()])
        expected = reference_average(window, decay)
        torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-6)
    mixed = sum(
        float(b) * torch.cat([t.double().reshape(-1) for t in c.values()])
        for b, c in zip(twa.averaging_weights[:, 0], candidates.values(), strict=True)
    )
    torch.testing.assert_close(weights(module), mixed, rtol=1e-5, atol=1e-5)


def test_running_averages_alone_are_enough(tmp_path) -> None:
    collect = CollectConfig(start=1, every_n_epochs=99, ema_decays=DECAYS)
    twa = TWACallback(4, collect=collect)
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert twa.phase == "done"
    assert twa.candidate_names == [f"ema({decay})" for decay in DECAYS]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_resumed_run_has_the_same_running_averages(tmp_path, every, storage) -> None:
    dirpath = str(tmp_path / "c") if storage == "disk" else None

    def make_twa() -> TWACallback:
        return TWACallback(
            4,
            collect=CollectConfig(start=1, ema_decays=DECAYS),
            storage=StorageConfig(kind=storage, dirpath=dirpath),
        )

    when = {"every_n_train_steps": 1} if every == "step" else {"every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, **when)
    whole = run(tmp_path, Regressor, make_twa, saver=saver)
    paths = sorted((tmp_path / "ck").glob("*=*.ckpt"))
    assert len(paths) == (24 if every == "step" else 6)
    for path in paths:
        assert differences(whole, run(tmp_path, Regressor, make_twa, path)) == []


def test_other_decays_on_resuming(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)

    def twa(*decays: float) -> Callable[[], TWACallback]:
        return lambda: TWACallback(4, collect=CollectConfig(start=1, ema_decays=decays))

    run(tmp_path, Regressor, twa(0.9), saver=saver)
    with pytest.raises(ValueError, match=r"ema_decays=\(0.9,\), but this callback has \(0.5,\)"):
        run(tmp_path, Regressor, twa(0.5), tmp_path / "ck" / "epoch=2.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.parametrize("averages", [{"ema_decays": DECAYS}, {"dense": True}])
def test_two_processes_have_the_same_running_averages(tmp_path, averages) -> None:
    collect = CollectConfig(start=1, **averages)
    ends, module = {}, Regressor()
    for processes in (1, 2):
        ends[processes] = fit(
            tmp_path / str(processes),
            TWACallback(4, collect=collect),
            deepcopy(module),
            processes,
            train=strided(processes),
            use_distributed_sampler=False,
        )
    (one,), (two, other) = ends[1], ends[2]
    assert two["candidate_names"] == one["candidate_names"]
    assert torch.equal(two["averaging_weights"], other["averaging_weights"])
    for mine, theirs in zip(one["candidates"], two["candidates"], strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
