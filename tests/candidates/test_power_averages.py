"""Averages whose memory is a share of the run, as candidates."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_twa
from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, run
from lightning_twa import SolverConfig, StorageConfig, average
from lightning_twa.candidates import fitted_factors
from lightning_twa.candidates.power_averages import PowerAverages, interval_of
from lightning_twa.candidates.profiles import gamma_of, profile, width_of

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")

WIDTHS = (0.05, 0.13, 0.23)
NAMES = ["power(0.05)", "power(0.13)", "power(0.23)", "mean"]


def reference(history: list[Tensor], gamma: float) -> Tensor:
    """The recursion of the paper (eq. 127), step by step in float64."""
    result = history[0].double()
    for t, now in enumerate(history[1:], start=2):
        result = result + (1 - (1 - 1 / t) ** (gamma + 1)) * (now.double() - result)
    return result


def wander(module: nn.Module, steps: int, averages: PowerAverages | None = None) -> list[Tensor]:
    """A random walk of the weights, and where it was after each step."""
    history = []
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape).to(p.dtype))
        if averages is not None:
            averages.update(module)
        history.append(weights(module))
    return history


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in values.values()])


@pytest.mark.parametrize("width", [0.001, 0.02, 0.05, 0.13, 0.23, 0.28])
def test_the_width_is_the_standard_deviation_of_the_weights_over_the_run(width: float) -> None:
    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-12)
    shares = torch.tensor(profile(gamma, 20000), dtype=torch.float64)
    times = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    mean = (shares * times).sum()
    spread = (shares * (times - mean).square()).sum().sqrt()
    assert float(shares.sum()) == pytest.approx(1)
    assert float(spread) == pytest.approx(width, rel=1e-2)


@pytest.mark.parametrize("in_background", [None, True])
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_every_step_enters_as_the_recursion_says(steps: int, in_background: bool | None) -> None:
    module, averages = Regressor(), PowerAverages(WIDTHS, in_background=in_background)
    history = wander(module, steps, averages)
    found = averages.weights()
    assert list(found) == NAMES
    for name, gamma in zip(NAMES, [*map(gamma_of, WIDTHS), 0.0], strict=True):
        expected = reference(history, gamma)
        torch.testing.assert_close(flat(found[name]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_background", [None, True])
@pytest.mark.parametrize("interval", [3, 7, 64])
def test_an_interval_has_the_weight_of_its_steps(interval: int, in_background: bool | None) -> None:
    module, averages = Regressor(), PowerAverages(WIDTHS, interval, in_background=in_background)
    history = wander(module, 100, averages)
    found = averages.weights()
    for name, gamma in zip(NAMES, [*map(gamma_of, WIDTHS), 0.0], strict=True):
        total, before = torch.zeros_like(history[0], dtype=torch.float64), 0
        for end in [*range(interval, 100, interval), 100]:
            share = (end / 100) ** (gamma + 1) - (before / 100) ** (gamma + 1)
            total += share * torch.stack(history[before:end]).double().mean(dim=0)
            before = end
        torch.testing.assert_close(flat(found[name]), total, rtol=1e-4, atol=1e-4)
    mean = torch.stack(history).double().mean(dim=0)
    torch.testing.assert_close(flat(found["mean"]), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "interval"), [(None, 1), (10, 1), (333, 1), (3300, 9), (10**6, 500)]
)
def test_the_interval_is_a_small_share_of_the_run(steps: int | None, interval: int) -> None:
    assert interval_of(steps) == interval


def test_low_precision_is_summed_in_float32_and_what_is_frozen_has_no_average() -> None:
    module = Regressor().bfloat16()
    module.net[0].requires_grad_(False)
    averages, history = PowerAverages((0.13,), 50), []
    for _ in range(300):
        averages.update(module)
        history.append(module.net[2].bias.detach().clone())
        with torch.no_grad():
            module.net[2].bias.add_(0.01)
    found = averages.weights()["mean"]
    assert set(found) == {"net.2.weight", "net.2.bias"}
    assert found["net.2.bias"].dtype == torch.float32
    mean = torch.stack(history).double().mean(dim=0)
    torch.testing.assert_close(found["net.2.bias"].double(), mean, rtol=1e-5, atol=1e-5)


def test_what_is_trained_later_counts_as_it_was_before_and_stays_in_when_frozen() -> None:
    module, averages, history = Regressor(), PowerAverages((0.13,), 4), []
    for step in range(30):
        module.net[0].requires_grad_(10 <= step < 20)
        with torch.no_grad():
            if 10 <= step < 20:
                module.net[0].bias.add_(1.0)
        averages.update(module)
        history.append(module.net[0].bias.detach().clone())
    # Its first step counts for those before it, too
    history[:10] = [history[10]] * 10
    mean = torch.stack(history).double().mean(dim=0)
    found = averages.weights()["mean"]["net.0.bias"].double()
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)


def test_a_parameter_of_another_shape_is_named() -> None:
    module, averages = Regressor(), PowerAverages((0.13,))
    averages.update(module)
    module.net[2] = nn.Linear(8, 2)
    with pytest.raises(
        ValueError, match=r"'net.2.weight' has changed its shape.*power_averages=\("
    ):
        averages.update(module)


def test_a_copy_goes_on_by_itself() -> None:
    module, averages = Regressor(), PowerAverages(WIDTHS, 3, in_background=True)
    wander(module, 10, averages)
    twin = copy.deepcopy(averages)
    wander(module, 5, twin)
    assert (averages.updates, twin.updates) == (10, 15)
    assert not torch.equal(averages.weights()["mean"]["net.0.bias"], flat(twin.weights()["mean"]))


# --- in a run


def make(storage: str = "memory", dirpath: Path | None = None, **kwargs: Any) -> TWACallback:
    collect = CollectConfig(**{"start": 2, "power_averages": WIDTHS, **kwargs})
    directory = None if dirpath is None or storage == "memory" else str(dirpath)
    kept = StorageConfig(kind=storage, dirpath=directory)
    return TWACallback(4, collect=collect, storage=kept)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_they_are_candidates_beside_the_snapshots(
    tmp_path: Path, accumulate: int, storage: str
) -> None:
    twa = make(storage, tmp_path / "c")
    module, recorder = Regressor(batchnorm=True), Recorder(twa)
    callbacks = [twa, recorder]
    trainer(tmp_path, callbacks=callbacks, accumulate_grad_batches=accumulate).fit(module, loader())
    assert twa.candidate_names == [*NAMES, "epoch=2", "epoch=3"]  # the last are those of epoch 3
    every = [w for phase, w in recorder.steps if phase == "collect"][accumulate - 1 :: accumulate]
    assert len(every) == 16 // accumulate
    found = {c.name: c.parameters for c in twa.candidates}
    for name, gamma in zip(NAMES, [*map(gamma_of, WIDTHS), 0.0], strict=True):
        torch.testing.assert_close(flat(found[name]), reference(every, gamma), rtol=1e-5, atol=1e-6)


def test_without_snapshots_there_are_the_averages_and_the_last_weights(tmp_path: Path) -> None:
    twa = make(every_n_epochs=None)
    module, recorder = Regressor(), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader())
    assert twa.candidate_names == [*NAMES, "step=16"]
    last = [w for phase, w in recorder.steps if phase == "collect"][-1]
    assert torch.equal(flat(twa.candidates[-1].parameters), last.double())


def test_the_last_weights_are_a_candidate_where_the_newest_snapshot_is_older(
    tmp_path: Path,
) -> None:
    twa = make(every_n_epochs=3, start=0)
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert twa.candidate_names == [*NAMES, "epoch=2", "step=16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_weights_are_taken_once(tmp_path: Path, dtype: str) -> None:
    collect = CollectConfig(start=2, power_averages=WIDTHS)
    twa = TWACallback(4, collect=collect, storage=StorageConfig(kind="memory", dtype=dtype))
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert twa.candidate_names == [*NAMES, "epoch=2", "epoch=3"]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_resumed_run_has_the_same(tmp_path: Path, every: str, storage: str) -> None:
    when = {"every_n_train_steps": 3} if every == "step" else {"every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, **when)

    def made() -> TWACallback:
        twa = make(storage, tmp_path / "c", start=1)
        twa._run.averaging.collector.averages.set_length = lambda steps: None  # type: ignore
        twa._run.averaging.collector.averages._power.interval = 5
        return twa

    whole = run(tmp_path, Regressor, made, saver=saver)
    paths = sorted((tmp_path / "ck").glob("*=*.ckpt"))
    assert len(paths) == (8 if every == "step" else 6)
    for path in paths:
        assert differences(whole, run(tmp_path, Regressor, made, path)) == []


def test_every_cycle_has_its_own(tmp_path: Path) -> None:
    collect = CollectConfig(start=1, power_averages=WIDTHS)
    twa, module = TWACallback(2, collect=collect, cycles=2), Regressor()
    recorder = Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader())
    assert twa.candidate_names == [*NAMES, "epoch=4"]
    second = [w for phase, w in recorder.steps if phase == "collect"][8:]
    assert len(second) == 8
    mean = next(c for c in twa.candidates if c.name == "mean")
    torch.testing.assert_close(flat(mean.parameters), reference(second, 0.0))


def test_a_uniform_average_and_a_soup_have_none(tmp_path: Path) -> None:
    default = lightning_twa.CollectConfig(start=1)
    swa = TWACallback(2, collect=default, solver=SolverConfig(name="uniform"), save_average=False)
    trainer(tmp_path, callbacks=[swa]).fit(Regressor(), loader())
    assert swa.candidate_names == [f"epoch={e}" for e in range(1, 6)]
    files = []
    for i, candidate in enumerate(swa.candidates[:3]):
        torch.save(candidate.parameters, tmp_path / f"{i}.pt")
        files.append(tmp_path / f"{i}.pt")
    soup = TWACallback(0, collect=CollectConfig(checkpoints=files, power_averages=WIDTHS))
    trainer(tmp_path, callbacks=[soup], max_epochs=1).fit(Regressor(), loader())
    assert soup.candidate_names == ["0", "1", "2"]


@pytest.mark.parametrize("bad", [(0.0,), (0.3,), ("wide",), (0.1, 0.1), 0.1, (float("nan"),)])
def test_other_widths_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid CollectConfig.power_averages=.*\(0, 0.28\]"):
        CollectConfig(power_averages=bad)


def test_something_must_be_collected() -> None:
    with pytest.raises(ValueError, match=r"keeps no weights.*Give every_n_epochs"):
        CollectConfig(every_n_epochs=None, power_averages=())


def test_other_widths_than_the_checkpoint_has_are_refused() -> None:
    averages = PowerAverages((0.1,))
    wander(Regressor(), 2, averages)
    with pytest.raises(ValueError, match=r"power_averages=\(0.1,\), but .* has \(0.2,\)"):
        PowerAverages((0.2,)).load_state_dict(averages.state_dict())


# --- thinning


@pytest.mark.parametrize("limit", [2, 3, 7, 16])
def test_an_evenly_thinned_window_has_one_distance(tmp_path: Path, limit: int) -> None:
    collect = CollectConfig(start=0, max_candidates=limit, keep="evenly")
    twa = TWACallback(40, collect=collect)
    trainer(tmp_path, callbacks=[twa], max_epochs=41).fit(Regressor(), loader(16))
    epochs = [int(name.split("=")[1]) for name in twa.candidate_names]
    assert limit / 2 < len(epochs) <= limit
    assert (epochs[0], epochs[-1]) == (0, 39)
    *gaps, last = [b - a for a, b in itertools.pairwise(epochs)]
    assert len(set(gaps)) <= 1
    assert not gaps or last <= gaps[0]


def test_auto_keeps_sixteen_and_all_of_a_uniform_average(tmp_path: Path) -> None:
    collect = CollectConfig(start=0, max_candidates="auto")
    twa = TWACallback(30, collect=collect)
    trainer(tmp_path, callbacks=[twa], max_epochs=31).fit(Regressor(), loader(16))
    assert twa.candidate_names == [*(f"epoch={e}" for e in range(0, 30, 2)), "epoch=29"]
    swa = TWACallback(0, collect=collect, solver=SolverConfig(name="uniform"))
    trainer(tmp_path, callbacks=[swa], max_epochs=31).fit(Regressor(), loader(16))
    assert swa.num_candidates == 31


# --- another width afterwards


def test_another_width_is_fitted_by_those_that_are_there(tmp_path: Path, caplog: Any) -> None:
    twa = make()
    module, recorder = Regressor(), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader())
    every = [w for phase, w in recorder.steps if phase == "collect"]
    with caplog.at_level("INFO"):
        found = average(twa, "power", sigma_rel=0.17)
    assert "sigma_rel=0.17 are fitted by 4 averages with a relative error of 0.0" in caplog.text
    expected = reference(every, gamma_of(0.17))
    far = (reference(every, 0.0) - expected).abs().max()
    off = (flat({n: found[n] for n, _ in module.named_parameters()}) - expected).abs().max()
    assert off < 0.05 * far


def test_a_width_that_is_there_is_that_average() -> None:
    factors = fitted_factors(["epoch=1", *NAMES], 0.13)
    assert factors == pytest.approx([0, 0, 1, 0, 0], abs=1e-9)
    assert sum(fitted_factors(NAMES, 0.08)) == pytest.approx(1)


def test_there_must_be_power_averages() -> None:
    with pytest.raises(ValueError, match="power averages, but there are 1"):
        fitted_factors(["mean", "epoch=1"], 0.1)
    with pytest.raises(ValueError, match=r"Invalid sigma_rel=0\.4"):
        fitted_factors(NAMES, 0.4)
