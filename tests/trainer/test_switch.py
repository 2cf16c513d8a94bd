"""The Trainer and the user's optimizer state are as before after the phase and every error."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.modules import Fails
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from helpers.runs import DATA

OWN = "(the end of TWACallback's phase)"


def snapshot(the_trainer: L.Trainer) -> dict[str, Any]:
    """What the phase changes, as the user had it."""
    strategy, loop = the_trainer.strategy, the_trainer.fit_loop
    return {
        "optimizers": list(map(id, strategy.optimizers)),
        "wrappers": [id(o._optimizer) for o in strategy._lightning_optimizers],
        "schedulers": [(id(c.scheduler), c.frequency) for c in strategy.lr_scheduler_configs],
        "source": id(loop._data_source.instance),
        "val_check_interval": the_trainer.val_check_interval,
        "accumulate": the_trainer.accumulate_grad_batches,
    }


class AtTheSwitch(L.Callback):
    """Before the switch: the Trainer and the states of the user's optimizer and scheduler."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 4:  # placed before the TWA callback
            self.trainer = snapshot(trainer)
            self.optimizer, self.scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
            self.states = self.now()

    def now(self) -> Any:
        return deepcopy((self.optimizer.state_dict(), self.scheduler.scheduler.state_dict()))


@DATA
def test_fit_leaves_the_trainer_and_the_user_s_states_as_before_the_phase(tmp_path, data) -> None:
    before = AtTheSwitch()
    twa = TWACallback(start_epoch=4, data=data)
    the_trainer = trainer(tmp_path, callbacks=[before, twa], val_check_interval=3)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert snapshot(the_trainer) == before.trainer
    assert equal(before.now(), before.states)
    assert the_trainer.train_dataloader.dataset is not None
    assert the_trainer.num_training_batches == 4


@pytest.mark.matrix(4)
@DATA
@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_phase_gives_the_trainer_back(tmp_path, data, where, error) -> None:
    before = AtTheSwitch()
    twa = TWACallback(start_epoch=4, data=data)
    recorder = Recorder(twa)
    the_trainer = trainer(tmp_path, callbacks=[before, twa, recorder], val_check_interval=3)
    raised = SystemExit if error is KeyboardInterrupt else error
    module = Fails(where, error)
    with pytest.raises(raised):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert snapshot(the_trainer) == before.trainer
    assert equal(before.now(), before.states)
    assert recorder.steps[-1][0] in ("optimize", "done")
    assert torch.equal(weights(module), recorder.steps[-1][1]), "the last average stays in place"


def test_a_signal_while_building_the_subspace_leaves_the_weights(tmp_path, monkeypatch) -> None:
    twa = TWACallback(start_epoch=4)
    recorder = Recorder(twa)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise SystemExit("signal")

    monkeypatch.setattr("lightning_twa.phases.span.build_subspace", fail)
    module = Regressor()
    the_trainer = trainer(tmp_path, callbacks=[twa, recorder])
    with pytest.raises(SystemExit, match="signal"):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert torch.equal(weights(module), recorder.epochs[3])
    assert twa.num_candidates == 2


@pytest.mark.filterwarnings("ignore:.*The last model of the previous .fit. call will be used")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_checkpoint_on_exception_resumes(tmp_path) -> None:
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    twa = TWACallback(start_epoch=4)
    saver = OnExceptionCheckpoint(tmp_path)
    the_trainer = trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="planned"):
        the_trainer.fit(Fails("validation", ValueError), loader(), loader(32, seed=1))
    checkpoint = torch.load(saver.ckpt_path, weights_only=True)
    assert "momentum_buffer" in checkpoint["optimizer_states"][0]["state"][0], (
        "the user's SGD state"
    )
    resumed = TWACallback(start_epoch=4)
    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[resumed]).fit(
        module, loader(), loader(32, seed=1), ckpt_path=saver.ckpt_path
    )
    assert resumed.phase == "done"


@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_what_fetched_the_data_of_the_phase_is_torn_down_when_it_is_left(tmp_path) -> None:
    """Its workers would wait for ever."""
    ends: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 2 and not hasattr(self, "fetcher"):
                self.fetcher = trainer.fit_loop._data_fetcher
                teardown = self.fetcher.teardown
                self.fetcher.teardown = lambda: (ends.append(trainer.current_epoch), teardown())

    twa = TWACallback(2, data="val", cycles=2, collect=CollectConfig(start=0))
    trainer(tmp_path, callbacks=[twa, Watch()], max_epochs=6).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    assert ends[0] == 3


@pytest.mark.parametrize(
    ("options", "how", "limit"),
    [
        ({"phase_steps": 5}, {"max_epochs": 6}, "max_epochs=6"),
        ({"phase_steps": 3}, {"max_epochs": -1, "max_steps": 22}, "max_steps=22"),
        ({"start_epoch": 3, "phase_steps": 6}, {"max_epochs": 50}, f"max_steps=18 {OWN}"),
        ({"start_epoch": 3, "phase_steps": 6}, {"max_epochs": -1}, f"max_steps=18 {OWN}"),
        ({"start_epoch": 0.5, "phase_steps": 6}, {"max_steps": 24}, f"max_steps=18 {OWN}"),
        ({"start_epoch": 4, "phase_steps": 600}, {"max_epochs": 6}, "max_epochs=6"),
    ],
)
def test_the_trainer_names_the_limit_that_ends_the_run(
    tmp_path, options, how, limit, caplog
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer(tmp_path, callbacks=[TWACallback(**options)], **how).fit(
            Regressor(), loader(), loader(32, seed=1)
        )
    stopped = [message for message in caplog.messages if "`Trainer.fit` stopped" in message]
    assert stopped == [f"`Trainer.fit` stopped: `{limit}` reached."]
