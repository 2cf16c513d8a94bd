"""Means over the optimizer steps between two moments, as candidates."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_twa
from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, equal, run
from helpers.runs import fit_fails
from helpers.sharded import NEEDS_FSDP2, Sharded
from helpers.sharded import fit as fit_shards
from lightning_twa import SolverConfig, StorageConfig
from lightning_twa.candidates.running_averages import RunningAverages
from lightning_twa.phases import room
from lightning_twa.phases.choose import fixed_averages

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint need to",
    "ignore:It is recommended to use .self.log.'val_loss",
)
STEPS = 4  # of an epoch


def flat(candidate: Any) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in candidate.parameters.values()])


def means(history: list[Tensor], bounds: list[tuple[int, int]]) -> list[Tensor]:
    """Over the weights after steps ``a + 1`` to ``b``, in float64."""
    return [torch.stack(history[a:b]).double().mean(0) for a, b in bounds]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[int, int]]]] = {
    # of CollectConfig, of the Trainer, steps of each mean
    "epochs": ({"start": 1}, {}, [(4, 8), (8, 12), (12, 16)]),
    "every second": ({"start": 0, "every_n_epochs": 2}, {}, [(0, 8), (8, 16)]),
    "steps": ({"start": 1, "every_n_train_steps": 3}, {}, [(4, 6), (6, 9), (9, 12), (12, 15)]),
    "accumulation": ({"start": 1}, {"accumulate_grad_batches": 2}, [(2, 4), (4, 6), (6, 8)]),
    "a window of two": ({"start": 0, "max_candidates": 2}, {}, [(8, 12), (12, 16)]),
    "beside averages": ({"start": 2, "ema_decays": (0.9,)}, {}, [(8, 12), (12, 16)]),
}


@pytest.mark.parametrize("case", CASES)
def test_candidates_are_means_over_all_steps_since_the_one_before(tmp_path, case) -> None:
    options, how, bounds = CASES[case]
    twa = TWACallback(4, collect=CollectConfig(dense=True, **options))
    history: list[Tensor] = []

    class Follow(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step > len(history):
                history.append(weights(pl_module))

    trainer(tmp_path, callbacks=[Follow(), twa], max_epochs=5, **how).fit(Regressor(), loader())
    found = [flat(c) for c in twa._run.store if not c.name.startswith("ema")]
    expected = means(history, bounds)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_many_steps_are_averaged_as_exactly_as_float32_can_be() -> None:
    module, mean = Regressor(), RunningAverages((1.0,))
    total = torch.zeros_like(weights(module), dtype=torch.float64)
    for _ in range(3000):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.01 * torch.randn_like(p))
        mean.update(module)
        total += weights(module).double()
    found = torch.cat([t.double().reshape(-1) for t in mean.weights(0).values()])
    error = (found - total / 3000).norm() / (total / 3000).norm()
    assert error < 3e-6


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("every", [{}, {"every_n_train_steps": 3}])
def test_a_resumed_run_has_the_same_means(tmp_path, kind, every) -> None:
    def make_twa() -> TWACallback:
        dirpath = str(tmp_path / "c") if kind == "disk" else None
        storage = StorageConfig(kind=kind, dirpath=dirpath)
        return TWACallback(4, collect=CollectConfig(start=1, dense=True, **every), storage=storage)

    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=1)
    whole = run(tmp_path, Regressor, make_twa, saver=saver)
    paths = sorted((tmp_path / "ck").glob("*=*.ckpt"))
    within = [p for p in paths if int(p.stem.rpartition("=")[2]) in (5, 7, 8, 11, 16)]
    assert len(within) == 5
    for path in within:
        assert differences(whole, run(tmp_path, Regressor, make_twa, path)) == []


@pytest.mark.parametrize("entry", ["updates", "averages", "decays"])
def test_a_damaged_mean_is_named(tmp_path, entry) -> None:
    def make_twa() -> TWACallback:
        return TWACallback(4, collect=CollectConfig(start=1, dense=True))

    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=6)
    run(tmp_path, Regressor, make_twa, saver=saver)
    checkpoint = torch.load(tmp_path / "ck" / "epoch=1-step=6.ckpt", weights_only=True)
    del checkpoint["callbacks"]["TWACallback"]["candidates"]["dense"][entry]
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=rf"damaged.* candidates\.dense\.{entry} is 'missing'"):
        run(tmp_path, Regressor, make_twa, tmp_path / "bad.ckpt")


def test_a_uniform_average_of_them_is_that_of_all_steps(tmp_path) -> None:
    twa = TWACallback(2, collect=CollectConfig(dense=True), solver=SolverConfig(name="uniform"))
    history: list[Tensor] = []

    class Follow(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if twa.phase == "collect":
                history.append(weights(pl_module))

    module = Regressor()
    trainer(tmp_path, callbacks=[Follow(), twa], max_epochs=5).fit(module, loader())
    (expected,) = means(history, [(2 * STEPS, 5 * STEPS)])
    torch.testing.assert_close(weights(module).double(), expected, rtol=1e-5, atol=1e-6)


def test_by_default_the_last_weights_are_a_candidate_too(tmp_path) -> None:
    collect = lightning_twa.CollectConfig(dense=True, every_n_train_steps=4)
    twa = lightning_twa.TWACallback(collect=collect, phase_steps=4)
    module = Regressor()
    trainer(tmp_path, callbacks=[twa], max_epochs=6).fit(module, loader(), loader(32, seed=1))
    assert twa.candidate_names[-2:] == ["step=20", "last(step=20)"]
    assert twa.result is not None
    assert "last weights" in twa.result.losses
    assert twa.result.losses["last weights"] != twa.result.losses["uniform"]


def test_fixed_averages_tell_means_from_the_last_weights() -> None:
    names = ["mean", "epoch=0", "epoch=1", "epoch=2", "last(step=14)"]
    found = fixed_averages(names, ["mean"], soup=False, dense=True)
    assert found["last weights"].tolist() == [0, 0, 0, 0, 1]
    assert found["uniform"].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert found["last 2"].tolist() == [0, 0, 0.5, 0.5, 0]
    found = fixed_averages(names[1:4], [], soup=False, dense=True)
    assert "last weights" not in found, "the newest is a mean"


def test_a_file_called_last_hides_nothing(tmp_path) -> None:
    torch.save(Regressor().state_dict(), tmp_path / "last.ckpt")
    collect = lightning_twa.CollectConfig(dense=True, checkpoints=str(tmp_path / "last.ckpt"))
    twa = lightning_twa.TWACallback(3, collect=collect, heldout=None)
    trainer(tmp_path, callbacks=[twa], max_epochs=4).fit(Regressor(), loader())
    assert twa.candidate_names[0] == "last"
    assert twa.candidate_names[-1] == "last(step=12)"


def test_a_parameter_that_is_frozen_between_two_candidates_stays_in_the_mean(tmp_path) -> None:
    twa = TWACallback(0, collect=CollectConfig(dense=True), solver=SolverConfig(name="uniform"))
    history: list[Tensor] = []

    class Freeze(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            history.append(weights(pl_module))
            if trainer.global_step == 2:
                pl_module.net[0].requires_grad_(False)

    trainer(tmp_path, callbacks=[Freeze(), twa], max_epochs=2).fit(Regressor(), loader())
    for one, other in zip(map(flat, twa._run.store), means(history, [(0, 4), (4, 8)]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_room_for_the_mean_is_counted(tmp_path, monkeypatch, device) -> None:
    """Three candidates, and a float32 copy of the trainable weights."""
    held = 4 * weights(Regressor()).numel()
    kind = StorageConfig(kind="memory")
    for there, dense, fits in ((4, True, True), (3.9, True, False), (3.9, False, True)):
        monkeypatch.setattr(room, "total_bytes", lambda *a, n=there, **k: int(n * held))
        options = {"ema_device": device} if dense else {}
        collect = CollectConfig(start=0, dense=dense, **options)
        twa = TWACallback(3, collect=collect, storage=kind, solver=SolverConfig(name="uniform"))
        how = trainer(tmp_path, callbacks=[twa], max_epochs=3)
        if fits:
            how.fit(Regressor(), loader())
        else:
            message = r"3 candidates of this model and the mean that becomes the next \(dense=True"
            with pytest.raises(ValueError, match=message):
                how.fit(Regressor(), loader())


@pytest.mark.parametrize("cycles", [2, 3])
def test_means_of_a_cycle_are_of_its_own_steps(tmp_path, cycles) -> None:
    twa = TWACallback(2, collect=CollectConfig(start=0, dense=True), cycles=cycles)
    history: list[tuple[str, Tensor]] = []

    class Follow(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            history.append((twa.phase, weights(pl_module)))

    how = trainer(tmp_path, callbacks=[Follow(), twa], max_epochs=3 * cycles)
    how.fit(Regressor(), loader())
    steps, first = [w for _, w in history], 3 * STEPS * (cycles - 1)
    bounds = [(first, first + STEPS), (first + STEPS, first + 2 * STEPS)]
    for one, other in zip(map(flat, twa._run.store), means(steps, bounds), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@NEEDS_FSDP2
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 5])
def test_means_of_sharded_parameters_travel_in_files(tmp_path, every) -> None:
    collect = CollectConfig(start=0, dense=True, every_n_train_steps=None if every == 1 else every)
    options, saved, module = {"collect": collect}, tmp_path / "saved", Sharded()
    (one,) = fit_shards(tmp_path / "one", deepcopy(module), 1, options)
    whole = fit_shards(tmp_path / "whole", module, 2, options, save_to=saved)
    for (_, a), (_, b) in zip(one["steps"], whole[0]["steps"], strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5
    path = saved / "epoch=1.ckpt"
    resumed = fit_shards(tmp_path / "resumed", Sharded(), 2, options, ckpt_path=path)
    for a, b in zip(whole, resumed, strict=True):
        assert equal(a["steps"][-len(b["steps"]) :], b["steps"])
        assert equal(a["averaging_weights"], b["averaging_weights"])


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_epochs=None keeps none"):
        lightning_twa.CollectConfig(dense=True, every_n_epochs=None)
    with pytest.raises(ValueError, match=r"Invalid CollectConfig.dense=2. Must be True or False."):
        lightning_twa.CollectConfig(dense=2)
    torch.save(Regressor().state_dict(), tmp_path / "a.pt")
    torch.save(Regressor().state_dict(), tmp_path / "b.pt")
    soup = CollectConfig(dense=True, checkpoints=str(tmp_path / "*.pt"))
    fit_fails(
        tmp_path, TWACallback(0, collect=soup),
        "CollectConfig(dense=True) needs epochs to collect in, but start_epoch=0. Pass "
        "start_epoch >= 1, or leave it out.",
    )  # fmt: skip
