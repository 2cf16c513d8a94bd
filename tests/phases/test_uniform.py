"""SWA, LAWA and EMA as a run: ``SolverConfig(name="uniform")``."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

import lightning_twa
from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.ddp import fit
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, equal, run, state
from lightning_twa import SolverConfig, StorageConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


UNIFORM = SolverConfig(name="uniform")


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("arguments", "collect", "expected"),
    [
        ({"start_epoch": 2}, {}, [2, 3, 4, 5]),
        ({"start_epoch": 0.5}, {"max_candidates": 2}, [4, 5]),
        ({}, {"start": 1, "every_n_epochs": 2}, [1, 3, 5]),
    ],
)
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_uniform_run_is_ordinary_training_and_its_average(
    tmp_path, arguments, collect, expected, storage
) -> None:
    dirpath = str(tmp_path / "c") if storage == "disk" else None
    twa = TWACallback(
        solver=UNIFORM,
        collect=CollectConfig(**collect),
        storage=StorageConfig(kind=storage, dirpath=dirpath),
        **arguments,
    )
    start = Regressor(batchnorm=True).state_dict()
    ends = []
    for callbacks in ([], [twa]):
        L.seed_everything(1, verbose=False)
        module = Regressor(batchnorm=True)
        module.load_state_dict(start)
        recorder = Recorder(twa)
        saver = ModelCheckpoint(tmp_path / str(len(callbacks)), save_last=True)
        the_trainer = trainer(
            tmp_path, callbacks=[*callbacks, recorder, saver], enable_checkpointing=True
        )
        validated: list[Tensor] = []
        module.on_validation_end = lambda m=module, v=validated: v.append(weights(m))
        the_trainer.fit(module, loader(), loader(32))
        ends.append((module, recorder, validated, saver))
    (_, plain, _, _), (module, _, validated, saver) = ends
    assert twa.phase == "done"
    assert twa.candidate_names == [f"epoch={e}" for e in expected]
    mean = torch.stack([plain.epochs[e] for e in expected]).mean(0)
    torch.testing.assert_close(weights(module), mean, rtol=1e-6, atol=1e-7)
    assert torch.equal(validated[-1], weights(module))
    assert equal(
        state(Regressor.load_from_checkpoint(saver.last_model_path, batchnorm=True)), state(module)
    )
    n = len(expected)
    assert torch.equal(twa.averaging_weights, torch.full((n, 1), 1 / n, dtype=torch.float64))
    assert twa.block_names == ["global"]


@pytest.mark.parametrize("how", ["max_steps", "early stopping", "by steps"])
def test_a_uniform_run_that_ends_early(tmp_path, how) -> None:
    options: dict[str, Any] = {"max_steps": {"max_steps": 18}}.get(how, {})
    collect = CollectConfig(start=1, every_n_train_steps=5 if how == "by steps" else None)
    twa = TWACallback(collect=collect, solver=UNIFORM)
    recorder = Recorder(twa)
    callbacks: list[Any] = [twa, recorder]
    if how == "early stopping":
        callbacks.append(EarlyStopping("val_loss", patience=0, min_delta=1e9, mode="min"))
    module = Regressor()
    trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader(), loader(32))
    assert twa.phase == "done"
    taken = {
        "max_steps": [f"epoch={e}" for e in (1, 2, 3, 4)],
        "early stopping": ["epoch=1"],
        "by steps": [f"step={s}" for s in (5, 10, 15, 20)],
    }
    assert twa.candidate_names == taken[how]
    mean = torch.stack([weights_of(c) for c in twa.candidates]).mean(0)
    torch.testing.assert_close(weights(module), mean, rtol=1e-6, atol=1e-7)


def weights_of(candidate: Any) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in candidate.parameters.values()])


def test_a_uniform_run_of_one_running_average_is_ema(tmp_path) -> None:
    collect = CollectConfig(start=0, every_n_epochs=99, ema_decays=(0.9,))
    twa = TWACallback(collect=collect, solver=UNIFORM)
    module, recorder = Regressor(), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader())
    raw = [w for _, w in recorder.steps[:-1]]
    (candidate,) = twa.candidates
    torch.testing.assert_close(weights(module), weights_of(candidate))
    assert twa.candidate_names == ["ema(0.9)"]
    factors = torch.tensor([0.9 ** (23 - s) for s in range(23)], dtype=torch.float64)
    known = (factors[:, None] * torch.stack(raw)).sum(0)
    assert float((weights(module) - known / factors.sum()).norm() / known.norm()) < 0.05


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_uniform_run_resumes(tmp_path, every) -> None:
    def make_twa() -> TWACallback:
        return TWACallback(2, solver=UNIFORM, validate_average=True)

    when = {"every_n_train_steps": 3} if every == "step" else {"every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, **when)
    whole = run(tmp_path, Regressor, make_twa, saver=saver)
    for path in sorted((tmp_path / "ck").glob("*=*.ckpt")):
        assert differences(whole, run(tmp_path, Regressor, make_twa, path)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
def test_a_uniform_run_of_two_processes(tmp_path) -> None:
    twa = TWACallback(2, solver=UNIFORM)
    first, second = fit(tmp_path / "r", twa, Regressor(batchnorm=True))
    assert first["phase"] == "done"
    assert equal(first["state"], second["state"])
    mean = {
        name: torch.stack([c[name] for c in first["candidates"]]).double().mean(0)
        for name in first["candidates"][0]
    }
    for name, tensor in mean.items():
        torch.testing.assert_close(first["state"][name].double(), tensor, rtol=1e-6, atol=1e-7)


def test_a_uniform_run_that_collects_nothing(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nothing to average: CollectConfig.start=9 \(epoch 9\)"):
        trainer(
            tmp_path, callbacks=[TWACallback(collect=CollectConfig(start=9), solver=UNIFORM)]
        ).fit(Regressor(), loader())
    twa = TWACallback(5, solver=UNIFORM)
    with pytest.warns(UserWarning, match="nothing to average") as caught:
        trainer(tmp_path, callbacks=[twa], max_steps=8).fit(Regressor(), loader())
    assert twa.phase == "collect"
    texts = [str(w.message) for w in caught if "nothing to average" in str(w.message)]
    assert texts[-1].startswith("There is nothing to average"), "at the start, and at the end"
    assert texts[0].startswith(
        "There will be nothing to average: max_steps=8 ends the run in epoch 1, before epoch 5,"
    )


@pytest.mark.parametrize("options", [{}, {"max_steps": 20}, {"limit_train_batches": 2}])
def test_steps_that_are_too_far_apart_for_a_uniform_run(tmp_path, options) -> None:
    collect = CollectConfig(start=0, every_n_train_steps=25)
    the_trainer = trainer(
        tmp_path, callbacks=[TWACallback(collect=collect, solver=UNIFORM)], **options
    )
    with pytest.raises(ValueError, match=r"nothing to average: collecting every 25 optimizer step"):
        the_trainer.fit(Regressor(), loader())
    assert the_trainer.global_step == 0


def test_a_uniform_run_without_an_end_is_not_counted(tmp_path) -> None:
    """Epochs without number."""

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    for collect in (CollectConfig(start=1), CollectConfig(start=1, every_n_train_steps=3)):
        twa = TWACallback(collect=collect, solver=UNIFORM)
        trainer(tmp_path, callbacks=[twa, Stop()], max_epochs=-1).fit(Regressor(), loader())
        assert twa.phase == "done"


def test_a_run_that_was_to_learn_goes_on_to_a_uniform_average(tmp_path) -> None:
    """Which needs no averages of all steps; candidates are those that both have taken."""
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    learning = lightning_twa.TWACallback(4, collect=lightning_twa.CollectConfig(start=0))
    trainer(tmp_path, callbacks=[learning, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32)
    )
    twa = lightning_twa.TWACallback(4, collect=lightning_twa.CollectConfig(start=0), solver=UNIFORM)
    module = Regressor()
    trainer(tmp_path, callbacks=[twa]).fit(
        module, loader(), loader(32), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert twa.candidate_names == [f"epoch={e}" for e in range(6)]
    mean = {
        n: sum(c.parameters[n] for c in twa.candidates) / 6 for n, _ in module.named_parameters()
    }
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, mean[name])
