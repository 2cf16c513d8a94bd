"""What a phase that fails does not hide, what comes after it, and what fails at the very end."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from helpers.common import Regressor, loader, trainer, weights
from helpers.fallback import KINDS, break_switch, check_sound_end, fit, planned, twa
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import is_borrowed
from lightning_twa import StorageConfig, SubspaceConfig
from lightning_twa.phases import fallback, span
from lightning_twa.subspace import Subspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:The TWA phase (could|failed)"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


# --- what is no failure of the phase


@pytest.mark.parametrize("where", ["build", "step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UserWarning])
def test_what_is_to_end_the_run_ends_it(tmp_path, monkeypatch, where, error) -> None:
    def act(*args: Any, **kwargs: Any) -> None:
        raise error("on purpose")

    monkeypatch.setattr(
        *((span, "build_subspace") if where == "build" else (Subspace, "project")), act
    )
    callback = twa()
    with pytest.raises((SystemExit, KeyboardInterrupt, UserWarning)):
        fit(tmp_path, callback)
    assert callback.phase == ("collect" if where == "build" else "optimize")
    assert not (tmp_path / "twa_candidates").exists()


class Raises(Regressor):
    """In the phase, forward or backward."""

    def __init__(self, where: str) -> None:
        super().__init__(batchnorm=True)
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 4 and self.where == "forward":
            raise RuntimeError("the user's own")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.trainer.current_epoch == 4 and self.where == "backward":
            raise RuntimeError("the user's own")


@pytest.mark.parametrize("kind", ["default", "mask"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_module_raises_in_the_phase_is_raised(tmp_path, where, kind) -> None:
    options = {"subspace": SubspaceConfig(parametrization="mask")} if kind == "mask" else {}
    callback = twa(**options)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, callback, Raises(where))
    assert callback.phase == "optimize"
    assert callback.state_dict()["phase"] == "optimize"


def test_before_the_first_batch_an_error_is_an_error(tmp_path, monkeypatch) -> None:
    """A soup, and a run that is resumed at the switch, have nothing to lose."""
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, save_on_train_epoch_end=True)
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "d"))
    fit(tmp_path, twa(storage=storage), callbacks=[saver], max_epochs=4)
    break_switch(monkeypatch, "build")
    (path,) = (tmp_path / "c").glob("epoch=2-*.ckpt")
    soup = TWACallback(0, collect=CollectConfig(checkpoints=str(tmp_path / "d" / "version_0")))
    for callback, file in ((twa(storage=storage), path), (soup, None)):
        the_trainer = trainer(tmp_path, callbacks=[callback], max_epochs=4)
        with pytest.raises(RuntimeError, match="planned"):
            the_trainer.fit(Regressor(batchnorm=True), loader(), loader(32, seed=1), ckpt_path=file)


# --- stopping and going on after a failure


def test_a_checkpoint_from_before_the_end_tries_the_phase_again(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, save_on_train_epoch_end=True)
    callback = twa()
    fit(tmp_path, callback, callbacks=[saver], min_epochs=6)
    (path,) = (tmp_path / "c").glob("epoch=3-*.ckpt")
    held = torch.load(path, weights_only=True)["callbacks"]["TWACallback"]
    assert held["phase"] == "collect"
    assert held["candidate_names"] == callback.candidate_names
    monkeypatch.undo()
    again = twa()
    the_trainer = trainer(tmp_path, callbacks=[again], max_epochs=6)
    the_trainer.fit(Regressor(batchnorm=True), loader(), loader(32, seed=1), ckpt_path=path)
    assert again.phase == "done"
    assert again.candidate_names == callback.candidate_names
    assert float(again.averaging_weights.std()) > 0


def test_an_interruption_after_the_failure_tries_the_phase_again(tmp_path, monkeypatch) -> None:
    class Boom(L.Callback):
        armed = True

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if self.armed and trainer.current_epoch == 4:
                self.armed = False
                raise KeyError

    break_switch(monkeypatch, "build")
    callback, module = twa(), Regressor(batchnorm=True)
    the_trainer = trainer(tmp_path, callbacks=[callback, Boom()], min_epochs=6)
    with pytest.raises(KeyError):
        the_trainer.fit(module, loader())
    assert callback.phase == "collect"
    assert callback.averaging_weights is None
    assert not is_borrowed(the_trainer)
    monkeypatch.undo()
    the_trainer.fit(module, loader())
    assert callback.phase == "done"
    assert float(callback.averaging_weights.std()) > 0


# --- what is left when files cannot be written, or there is no average


def test_candidates_that_cannot_be_written_stay_in_memory(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    (tmp_path / "twa_candidates").write_text("a file in the directory's place")
    callback = twa()
    with pytest.warns(UserWarning, match=r"could not be written to .*twa_candidates .*: save thos"):
        module, _, watch = fit(tmp_path, callback)
    check_sound_end(tmp_path, callback, module, watch)
    assert len(callback.candidates) == 3


def test_without_an_average_the_first_error_is_raised(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    monkeypatch.setattr(fallback, "put_average", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="planned"):
        fit(tmp_path, twa())


@pytest.mark.parametrize("kind", ["groups", "mask"])
def test_a_result_that_cannot_be_put_together(tmp_path, monkeypatch, kind) -> None:
    """At the very end, say because a candidate's file has gone: what was learned is kept."""
    module = Regressor()

    class AtEnd(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 23:
                monkeypatch.setattr(span, "put_weighted", planned)

    callback = twa(4, **KINDS[kind])
    with pytest.warns(UserWarning, match=r"could not be put together .*RuntimeError: planned"):
        fit(tmp_path, callback, module, callbacks=[AtEnd()], max_epochs=6)
    assert callback.phase == "done"
    members, learned = callback.candidates, callback.averaging_weights[:, 0]
    mean = sum(
        w * torch.cat([c.parameters[n].double().reshape(-1) for n, _ in module.named_parameters()])
        for w, c in zip(learned.tolist(), members, strict=True)
    )
    assert torch.allclose(weights(module), mean, atol=1e-6)


def test_data_that_cannot_be_read_again_for_batchnorm(tmp_path) -> None:
    """Training data is asked for once more where a run was resumed in the phase."""

    class Once(Regressor):
        asked = 0

        def train_dataloader(self) -> DataLoader:
            self.asked += 1
            if self.asked > 1:
                raise OSError("gone")
            return loader()

        def val_dataloader(self) -> DataLoader:
            return loader(32, seed=1)

        def twa_dataloader(self) -> DataLoader:
            return loader(32, seed=2)

    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, save_on_train_epoch_end=True)
    how: dict[str, Any] = {"max_epochs": 6, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[twa(data="twa"), saver], **how).fit(Once(batchnorm=True))
    (path,) = (tmp_path / "c").glob("epoch=3-*.ckpt")
    callback, module = twa(data="twa"), Once(batchnorm=True)
    module.asked = 1
    with pytest.warns(UserWarning, match=r"could not be re-estimated .*\(OSError: gone\)"):
        trainer(tmp_path, callbacks=[callback], max_epochs=6).fit(module, ckpt_path=path)
    assert callback.phase == "done"
