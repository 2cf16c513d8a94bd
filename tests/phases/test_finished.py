"""The finished average is in a file, can be had whatever the model holds, and is compared."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from helpers.common import Regressor, loader, mse, trainer
from helpers.ddp import fit as fit_ddp
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import SolverConfig, StorageConfig

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "cycles": {"start_epoch": 2, "cycles": 2},
    "disk": {"storage": StorageConfig(kind="disk")},
    "validated": {"validate_average": True},
    "uniform, validated": {"solver": SolverConfig(name="uniform"), "validate_average": True},
}


class WithLoader(Regressor):
    """Loadable by ``load_from_checkpoint``, and testable without loaders."""

    def __init__(self, batchnorm: bool = True, lr: float = 0.05) -> None:
        super().__init__(batchnorm, lr)
        self.save_hyperparameters()

    def test_dataloader(self) -> Any:
        return loader(32, seed=2)


def twa(**kwargs: Any) -> TWACallback:
    return TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **kwargs})


def best_before(path: Path) -> ModelCheckpoint:
    """The recipe of everybody; its best is always the first."""
    return ModelCheckpoint(path, monitor="epoch_number", mode="min", save_last=True)


class Numbered(WithLoader):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("epoch_number", float(self.current_epoch))
        self.log("val_loss", mse(self.net(batch[0]), batch[1]))


def run(path: Path, callback: TWACallback, *others: Any, **kwargs: Any) -> tuple[Any, L.Trainer]:
    module = Numbered()
    the_trainer = trainer(path, callbacks=[callback, *others], max_epochs=8, **kwargs)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    return module, the_trainer


@pytest.mark.matrix(3)
@pytest.mark.filterwarnings("ignore:In trainer.test", "ignore:..test.ckpt_path=None")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_average_when_the_best_checkpoint_does_not(tmp_path, kind, caplog) -> None:
    callback = twa(**KINDS[kind])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        module, the_trainer = run(
            tmp_path, callback, best_before(tmp_path / "k"), enable_checkpointing=True
        )
    average = state(module)
    path = tmp_path / "k" / "twa.ckpt"
    assert callback.average_path == str(path)
    assert sorted(p.name for p in (tmp_path / "k").iterdir() if "twa" in p.name) == ["twa.ckpt"]
    saved = torch.load(path, weights_only=True)
    assert equal(dict(saved["state_dict"]), average)
    assert saved["callbacks"]["TWACallback"]["phase"] == "done"
    assert "optimizer_states" not in saved
    loaded = WithLoader.load_from_checkpoint(path, weights_only=True)
    assert equal(state(loaded), average)
    shown = caplog.text
    assert f"TWA: the average is in {path}." in shown
    assert "holds other weights than the average; trainer.test() without a model" in shown
    # trainer.test() puts the best checkpoint into the model
    the_trainer.test(verbose=False)
    assert not equal(state(module), average)
    assert equal(callback.average_state_dict(), average)
    (result,) = trainer(tmp_path).test(WithLoader(), ckpt_path=path, verbose=False)
    module.load_state_dict(callback.average_state_dict())
    (again,) = trainer(tmp_path).test(module, verbose=False)
    assert result == again


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")
@pytest.mark.parametrize("save", [True, False])
def test_without_a_file_the_last_line_says_where_the_average_is(tmp_path, caplog, save) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run(tmp_path, twa(save_average=save), enable_checkpointing=not save)
    lines = [line for line in caplog.messages if line.startswith("TWA:")]
    off = "checkpointing is off; save_average='average.ckpt' would write one"
    why = off if save else "save_average=False"
    assert lines[-1] == (
        f"TWA: the average is in the model, and in average_state_dict() of the callback; no file "
        f"has it ({why})."
    )


def test_what_the_model_holds_is_compared_at_the_end(tmp_path) -> None:
    class Ema(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].bias += 1.0

    for first in (True, False):
        callback, module = twa(), Numbered()
        callbacks = [Ema(), callback] if first else [callback, Ema()]
        with pytest.warns(
            UserWarning,
            match=r"^At the end of the run the model does not hold the average .* 1 of \d+ tensors "
            r"are others \(the first is 'net.0.bias'\).*in memory: .*average_state_dict\(\), "
            r"strict=False\)\.$",
        ):
            trainer(tmp_path, callbacks=callbacks).fit(module, loader(), loader(32, seed=1))
        average = callback.average_state_dict()
        assert torch.allclose(average["net.0.bias"] + 1.0, module.net[0].bias)
        weight = sum(
            float(w) * c.parameters["net.0.weight"].double()
            for w, c in zip(callback.averaging_weights[:, 0], callback.candidates, strict=True)
        )
        assert torch.allclose(average["net.0.weight"].double(), weight, atol=1e-6)


@pytest.mark.parametrize("what", ["test", "validate", "predict"])
def test_other_weights_are_named_when_they_are_judged(tmp_path, what) -> None:
    class Predicts(Numbered):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    callback, module = twa(), Predicts()
    the_trainer = trainer(tmp_path, callbacks=[callback])
    the_trainer.fit(module, loader(), loader(32, seed=1))
    judge = getattr(the_trainer, what)
    judge(module, loader(32))  # the average: nothing is said
    with torch.no_grad():
        module.net[0].bias += 1.0
    with pytest.warns(UserWarning, match=rf"^In trainer.{what}\(\) the model does not hold"):
        judge(module, loader(32))
    judge(module, loader(32))  # once


@pytest.mark.parametrize("where", [True, False, "own/name.ckpt"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_where_it_is_written(tmp_path, monkeypatch, where, checkpoints) -> None:
    monkeypatch.chdir(tmp_path)
    callback = twa(save_average=where)
    saver = [ModelCheckpoint(tmp_path / "k")] if checkpoints else []
    module, _ = run(tmp_path, callback, *saver, enable_checkpointing=checkpoints)
    expected = {True: "k/twa.ckpt" if checkpoints else None, False: None}.get(where, where)
    written = [
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.ckpt") if "epoch" not in p.name
    ]
    assert written == ([] if expected is None else [expected])
    assert (callback.average_path is None) == (expected is None)
    assert equal(callback.average_state_dict(), state(module))


def test_the_file_of_another_run_is_not_replaced(tmp_path) -> None:
    averages = []
    for name in ("twa.ckpt", "twa-v1.ckpt", "twa-v2.ckpt"):
        callback = twa()
        saver = ModelCheckpoint(tmp_path / "k", save_top_k=0)
        module, _ = run(tmp_path, callback, saver, enable_checkpointing=True)
        assert callback.average_path == str(tmp_path / "k" / name)
        averages.append((callback.average_path, state(module)))
    for path, average in averages:
        assert equal(dict(torch.load(path, weights_only=True)["state_dict"]), average)


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path) -> None:
    class Later(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            (tmp_path / "file").write_text("no directory")

    callback = twa(save_average=tmp_path / "file" / "twa.ckpt")
    with pytest.warns(
        UserWarning, match=r"^The average could not be written to .*Error: .*save_average"
    ):
        module, _ = run(tmp_path, callback, Later())
    assert callback.phase == "done"
    assert callback.average_path is None
    assert equal(callback.average_state_dict(), state(module))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    callback = twa(save_average=tmp_path / "here" / "twa.ckpt")
    with pytest.warns(UserWarning, match="No space left on device"):
        run(tmp_path, callback)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")
def test_a_finished_checkpoint_gives_it_too(tmp_path) -> None:
    first, saver = twa(save_average=False), ModelCheckpoint(tmp_path / "k", save_last=True)
    module, _ = run(tmp_path, first, saver, enable_checkpointing=True)
    second, other = twa(), Numbered()
    path = tmp_path / "k" / "last.ckpt"
    trainer(tmp_path, callbacks=[second], max_epochs=8).fit(other, loader(), ckpt_path=path)
    with torch.no_grad():
        other.net[0].bias += 1.0
    assert equal(second.average_state_dict(), state(module))


def test_names_are_those_of_the_module_that_is_given(tmp_path) -> None:
    callback = twa()
    module, _ = run(tmp_path, callback)
    wrapped = nn.ModuleDict({"_orig_mod": Numbered()})
    assert list(callback.average_state_dict(wrapped)) == list(wrapped.state_dict())
    wrapped.load_state_dict(callback.average_state_dict(wrapped))
    assert equal(state(wrapped["_orig_mod"]), state(module))
    with pytest.raises(ValueError, match="The average has no tensor 'weight', which this module"):
        callback.average_state_dict(nn.Linear(2, 2))


def test_before_the_end_there_is_none(tmp_path) -> None:
    with pytest.raises(ValueError, match="There is no finished average: the phase has not ended"):
        twa().average_state_dict()


@pytest.mark.parametrize("value", ["", 3, None, ["a"]])
def test_invalid_save_average(value) -> None:
    with pytest.raises(ValueError, match=r"Invalid save_average=.* Must be True \(beside"):
        twa(save_average=value)


def test_a_finished_callback_with_a_file_pickles_small(tmp_path) -> None:
    callback = twa(save_average=tmp_path / "twa.ckpt")
    module, _ = run(tmp_path, callback)
    assert callback._run.averaging.finished._state == {}
    again = pickle.loads(pickle.dumps(callback))
    assert again.average_path == callback.average_path
    assert equal(again.average_state_dict(), state(module))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")
def test_rank_zero_writes_and_every_rank_knows_the_path(tmp_path) -> None:
    class Tell(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.extra = torch.tensor(callback.average_path.endswith("average.ckpt"))

    callback = TWACallback(
        4, collect=CollectConfig(start=1), save_average=tmp_path / "average.ckpt"
    )
    reports = fit_ddp(tmp_path / "run", callback, Regressor(batchnorm=True), callbacks=[Tell()])
    assert all(bool(report["extra"]) for report in reports)
    saved = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    assert equal(dict(saved), dict(reports[0]["state"]))


def test_a_run_that_is_resumed_and_ends_again_has_one_file(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "k", save_top_k=-1, save_on_train_epoch_end=True)
    module, _ = run(tmp_path, twa(), saver, enable_checkpointing=True)
    for epoch in (1, 5):
        (path,) = (tmp_path / "k").glob(f"epoch={epoch}-*.ckpt")
        callback, again = twa(), Numbered()
        saver = ModelCheckpoint(tmp_path / "k", save_top_k=0)
        trainer(tmp_path, callbacks=[callback, saver], max_epochs=8, enable_checkpointing=True).fit(
            again, loader(), loader(32, seed=1), ckpt_path=path
        )
        assert equal(state(again), state(module))
        assert callback.average_path == str(tmp_path / "k" / "twa.ckpt")
        assert len(list((tmp_path / "k").glob("twa*"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_go_on_from_the_average_alone(tmp_path, kind) -> None:
    """Which Lightning says too, but not what to do. The file can be tested, and fitted anew."""
    callback, module = twa(save_average=str(tmp_path / "a.ckpt"), **KINDS[kind]), WithLoader()
    trainer(tmp_path, callbacks=[callback]).fit(module, loader(), loader(32, seed=1))
    path = tmp_path / "a.ckpt"
    message = f"{path.name} holds an average alone: .*WithLoader.load_from_checkpoint"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callbacks=[twa(**KINDS[kind])], max_epochs=8).fit(
            WithLoader(), loader(), loader(32, seed=1), ckpt_path=path
        )
    trainer(tmp_path, callbacks=[twa(**KINDS[kind])]).test(WithLoader(), ckpt_path=path)
    again = WithLoader.load_from_checkpoint(path)
    assert equal(state(again), state(module))
    callback = twa(**KINDS[kind])
    trainer(tmp_path, callbacks=[callback]).fit(again, loader(), loader(32, seed=1))
    assert callback.phase == "done"
