"""Runs that have no phase, end before it, or go on after it."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import TWACallback
from helpers.runs import fit, is_borrowed, plain_weights

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class StopAt(EarlyStopping):
    """Stops at the end of an epoch, whatever the metric."""

    def __init__(self, epoch: int) -> None:
        super().__init__("val_loss")
        self.epoch = epoch

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == self.epoch


NEVER_RAN = (
    "TWA never ran: training stopped after {} epochs and {} optimizer steps, before start_epoch=4 "
    "began the phase. The weights are those of ordinary training. Lower start_epoch to run it."
)


@pytest.mark.parametrize("epoch", [1, 3])
def test_early_stopping_before_the_phase_warns_and_leaves_the_weights(tmp_path, epoch) -> None:
    twa, module = TWACallback(start_epoch=4, validate_average=True), Regressor()
    message = NEVER_RAN.format(epoch + 1, 4 * (epoch + 1))
    the_trainer = trainer(tmp_path, callbacks=[twa, StopAt(epoch)])
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert twa.phase == "collect"
    assert twa.num_candidates == (2 if epoch == 3 else 0)
    assert torch.equal(weights(module), plain_weights(tmp_path, callbacks=[StopAt(epoch)]))
    assert not is_borrowed(the_trainer)


@pytest.mark.parametrize("steps", [7, 16])
def test_max_steps_before_the_phase_warns_and_leaves_the_weights(tmp_path, steps) -> None:
    twa, module = TWACallback(start_epoch=4), Regressor()
    last = -(-steps // 4) - 1
    early = (
        f"TWA will not run: max_steps={steps} ends the run in epoch {last}, before start_epoch=4 "
        f"begins the phase. Lower start_epoch to {last} or less, or raise max_steps."
    )
    with pytest.warns(UserWarning, match="^TWA") as caught:
        trainer(tmp_path, callbacks=[twa], max_steps=steps).fit(
            module, loader(), loader(32, seed=1)
        )
    messages = [str(w.message) for w in caught if "TWA" in str(w.message)]
    assert messages == [early, NEVER_RAN.format(last + 1, steps)]
    assert torch.equal(weights(module), plain_weights(tmp_path, max_steps=steps))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_finished_run_cannot_go_on(tmp_path) -> None:
    message = (
        "The TWA phase of this run was finished, but the Trainer goes on with epoch 6. Pass "
        "TWACallback(continue_from='average') or 'raw' to train on from the average or from the "
        "weights before it, from the start of an epoch on; or load the averaged weights into a new "
        "run (load_from_checkpoint, a new Trainer and a new TWACallback)."
    )
    twa, module = TWACallback(start_epoch=4), Regressor()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    the_trainer = trainer(tmp_path, callbacks=[twa, checkpoint], enable_checkpointing=True)
    the_trainer.fit(module, loader())
    average, beta = weights(module), twa.averaging_weights
    the_trainer.fit_loop.max_epochs = 8
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, loader())
    assert torch.equal(weights(module), average)
    assert torch.equal(twa.averaging_weights, beta)
    assert not is_borrowed(the_trainer)

    again, other = TWACallback(start_epoch=4), Regressor()
    resumed = trainer(tmp_path, callbacks=[again], max_epochs=8)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        resumed.fit(other, loader(), ckpt_path=checkpoint.last_model_path)
    assert torch.equal(weights(other), average)

    L.seed_everything(2, verbose=False)
    fresh = TWACallback(start_epoch=4)
    loaded = Regressor.load_from_checkpoint(checkpoint.last_model_path)
    trainer(tmp_path, callbacks=[fresh]).fit(loaded, loader())
    assert fresh.phase == "done"


def test_start_epoch_as_fraction(tmp_path) -> None:
    twa = TWACallback(start_epoch=0.5)
    fit(tmp_path, twa, max_epochs=8)
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


def test_fast_dev_run_does_nothing(tmp_path) -> None:
    twa = TWACallback(start_epoch=100)
    trainer(tmp_path, callbacks=[twa], fast_dev_run=True).fit(Regressor(), loader())
    assert twa.phase == "collect"
    assert twa.num_candidates == 0


@pytest.mark.filterwarnings("ignore")  # the tuners' own
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_lr_finder_is_left_alone(tmp_path, caplog, how) -> None:
    class Tuned(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    twa = TWACallback(start_epoch=4)
    finder = [LearningRateFinder(num_training_steps=8)] if how == "callback" else []
    the_trainer = trainer(tmp_path, callbacks=[*finder, twa], enable_checkpointing=True)
    module = Tuned()
    if how == "tuner":
        Tuner(the_trainer).lr_find(module, loader(), num_training=8)
        assert "TWA" not in caplog.text
        assert twa.phase == "collect"
        assert twa.num_candidates == 0
    the_trainer.fit(module, loader())
    assert "collecting starts here" not in caplog.text
    assert twa.phase == "done"
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


@pytest.mark.filterwarnings("ignore")  # the tuner's own
def test_batch_size_finder_is_left_alone(tmp_path) -> None:
    class Sized(Regressor):
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return loader(batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return loader(batch_size=self.batch_size)

    twa = TWACallback(start_epoch=4)
    the_trainer = trainer(tmp_path, callbacks=[twa], enable_checkpointing=True)
    module = Sized()
    Tuner(the_trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert twa.num_candidates == 0
    the_trainer.fit(module)
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


def test_two_fits_with_one_callback(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    fit(tmp_path, twa)
    first_beta = twa.averaging_weights
    L.seed_everything(8, verbose=False)
    second, recorder, _ = fit(tmp_path, twa, Regressor(lr=0.02))
    assert twa.phase == "done"
    assert twa.num_candidates == 2
    assert not torch.equal(first_beta, twa.averaging_weights)
    beta = twa.averaging_weights
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    torch.testing.assert_close(weights(second), expected, rtol=1e-6, atol=1e-7)


def test_validate_test_and_predict_outside_fit_are_left_alone(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    module, _, the_trainer = fit(tmp_path, twa)
    before = weights(module)
    beta = twa.averaging_weights
    the_trainer.validate(module, loader(), verbose=False)
    the_trainer.test(module, loader(), verbose=False)
    assert torch.equal(before, weights(module))
    assert torch.equal(beta, twa.averaging_weights)
    assert twa.phase == "done"
