"""EarlyStopping is asleep in the phase, and what ends a phase early is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from lightning_twa import SolverConfig, SubspaceConfig

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "val": {"data": "val"},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "validated": {"validate_average": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class Impatient(EarlyStopping):
    """Would stop in the first validation that it is asked about from an epoch on."""

    def __init__(self, epoch: int, **kwargs: Any) -> None:
        super().__init__("val_loss", **kwargs)
        self.epoch = epoch
        self.asked: list[int] = []

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        self.asked.append(trainer.current_epoch)
        trainer.should_stop = trainer.current_epoch >= self.epoch
        self.stopped_epoch = trainer.current_epoch if trainer.should_stop else 0


@pytest.mark.matrix(5)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("when", [{}, {"check_on_train_epoch_end": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_end_a_phase(tmp_path: Path, kind: str, when: Any, first: bool) -> None:
    outcomes = []
    for stopping in ([], [Impatient(4, **when)]):
        L.seed_everything(1, verbose=False)
        twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
        callbacks = [*stopping, twa] if first else [twa, *stopping]
        module = Regressor(batchnorm=True)
        the_trainer = trainer(tmp_path, callbacks=callbacks, max_epochs=8)
        the_trainer.fit(module, loader(), loader(32, seed=1))
        assert the_trainer.current_epoch == 8
        assert twa.phase == "done"
        outcomes.append((state(module), twa.averaging_weights))
    assert equal(*outcomes)
    assert stopping[0].asked == [0, 1, 2, 3]
    assert "_run_early_stopping_check" not in vars(stopping[0])


def test_it_sleeps_in_a_phase_that_is_resumed(tmp_path) -> None:
    def run(ckpt_path: Path | None = None) -> tuple[Any, Impatient]:
        L.seed_everything(1, verbose=False)
        stopping, module = Impatient(4), Regressor(batchnorm=True)
        twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        the_trainer = trainer(
            tmp_path, callbacks=[stopping, twa, saver], max_epochs=8, enable_checkpointing=True
        )
        the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=ckpt_path)
        return (state(module), twa.averaging_weights, the_trainer.current_epoch), stopping

    whole, _ = run()
    assert whole[2] == 8
    for epoch in (3, 5):
        found, stopping = run(tmp_path / f"epoch={epoch}.ckpt")
        assert equal(found, whole)
        assert stopping.asked == []


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_wakes_in_the_next_cycle_with_a_fresh_best(tmp_path, mode) -> None:
    class Notes(EarlyStopping):
        def __init__(self) -> None:
            super().__init__("val_loss", mode=mode, patience=50)
            self.notes: list[tuple[int, float, int]] = []

        def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
            self.notes.append((trainer.current_epoch, float(self.best_score), self.wait_count))
            super()._run_early_stopping_check(trainer)

    stopping = Notes()
    twa = TWACallback(start_epoch=2, cycles=2, collect=CollectConfig(start=0))
    trainer(tmp_path, callbacks=[stopping, twa], max_epochs=8).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    worst = float("inf" if mode == "min" else "-inf")
    assert [epoch for epoch, *_ in stopping.notes] == [0, 1, 4, 5]
    assert stopping.notes[2] == (4, worst, 0)
    assert stopping.notes[3][1] != worst


def test_an_exception_in_the_phase_wakes_it(tmp_path) -> None:
    class Crashes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 5:
                raise KeyError

    stopping = Impatient(9)
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    the_trainer = trainer(tmp_path, callbacks=[stopping, twa, Crashes()])
    with pytest.raises(KeyError):
        the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert "_run_early_stopping_check" not in vars(stopping)


class Stops(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 22


@pytest.mark.parametrize("kind", ["default", "val", "groups"])
def test_what_ends_a_phase_early_is_said_with_the_steps_done(tmp_path, kind, caplog) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    trainer(tmp_path, callbacks=[twa, Stops()], max_epochs=8).fit(
        Regressor(), loader(), loader(64, 16, seed=1)
    )
    assert twa.phase == "done"
    assert "TWA: phase cut short after 6 of 16 optimizer steps in" in caplog.text


def test_a_whole_phase_is_finished(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert "TWA: phase finished after 8 optimizer steps in" in caplog.text


def test_a_run_that_it_ends_before_the_phase_is_told_how_to_begin_one(tmp_path) -> None:
    twa = TWACallback(start_epoch=6)
    with pytest.warns(
        UserWarning, match=r"TWA never ran.*Pass .*start_on_early_stopping=True.*or lower"
    ):
        trainer(tmp_path, callbacks=[Impatient(3), twa], max_epochs=8).fit(
            Regressor(), loader(), loader(32, seed=1)
        )


@pytest.mark.parametrize(
    ("collect", "names"),
    [
        ({}, ["epoch=1", "epoch=2", "epoch=3"]),
        ({"max_candidates": 2}, ["epoch=2", "epoch=3"]),
        ({"start": 0}, ["epoch=0", "epoch=1", "epoch=2", "epoch=3"]),
        ({"start": 3, "max_candidates": 5}, None),
    ],
)
def test_the_window_holds_the_last_epochs_when_it_begins_the_phase(
    tmp_path, collect, names
) -> None:
    """By default as many as there would have been: of epochs 3 to 5."""
    twa = TWACallback(6, collect=CollectConfig(**collect), start_on_early_stopping=True)
    stopping = Impatient(3)
    the_trainer = trainer(tmp_path, callbacks=[stopping, twa], max_epochs=12)
    if names is None:
        with pytest.warns(UserWarning, match="TWA never ran"):
            the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
        return
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.candidate_names == names
    assert the_trainer.current_epoch == 10, "four epochs and the six of the phase"


def test_a_uniform_run_is_ended_by_it_as_ever(tmp_path) -> None:
    twa = TWACallback(2, solver=SolverConfig(name="uniform"))
    the_trainer = trainer(tmp_path, callbacks=[Impatient(4), twa], max_epochs=8)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert the_trainer.current_epoch == 5
    assert torch.equal(twa.averaging_weights[:, 0], torch.full((3,), 1 / 3, dtype=torch.float64))
