"""Runs that ``max_time`` ends: where the phase falls is estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer

import lightning_twa
from helpers.common import Regressor, loader, trainer
from helpers.ddp import fit as fit_several
from helpers.plain import CollectConfig, TWACallback
from helpers.short import holds_its_average
from lightning_twa import SolverConfig
from lightning_twa.phases import placing, stages
from lightning_twa.phases.timed import TimedLength

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint need to",
    "ignore:It is recommended to use .self.log.'val_loss",
)


class Clock(Timer):
    """Goes by optimizer steps, of which those of the phase take longer, and the first ones too."""

    def __init__(self, seconds: float, slow: float = 1.5, start: float = 5.0) -> None:
        super().__init__({"seconds": 1}, verbose=False)
        self._duration = seconds
        self.slow, self.start = slow, start
        self.now = 0.0
        self.in_phase: list[int] = []

    def time_elapsed(self, stage: Any = None) -> float:
        return self.now

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        twa = next(c for c in trainer.callbacks if isinstance(c, lightning_twa.TWACallback))
        phase = twa.phase != "collect"
        if phase:
            self.in_phase.append(trainer.global_step)
        self.now += self.slow if phase else 1.0
        self.now += self.start if trainer.global_step == 1 else 0.0
        super().on_train_batch_end(trainer, *args)

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state["now"]


def fit(
    path: Path, options: dict[str, Any], seconds: float, ckpt: Any = None, **how: Any
) -> tuple[lightning_twa.TWACallback, Clock, L.Trainer]:
    L.seed_everything(3, verbose=False)
    twa, module = how.pop("twa", TWACallback)(**options), Regressor()
    clock = Clock(seconds, how.pop("slow", 1.5), how.pop("start", 5.0))
    how = {"max_epochs": -1, **how}
    the_trainer = trainer(path, callbacks=[twa, clock, *how.pop("callbacks", [])], **how)
    the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt)
    holds_its_average(twa, module)
    return twa, clock, the_trainer


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # callback, Trainer, steps of the phase
    "steps": ({"phase_steps": 6}, {}, 6),
    "with another limit": ({"phase_steps": 6}, {"max_epochs": 900, "max_steps": 9000}, 6),
    "a fraction": ({"phase_steps": 0.1}, {}, 21),
    "a fraction of the run": ({"start_epoch": 0.7, "phase_steps": 8}, {}, 8),
    "an epoch and steps": ({"start_epoch": 12, "phase_steps": 8}, {}, 8),
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("case", CASES)
def test_the_phase_is_whole_when_time_ends_the_run(tmp_path, case, caplog) -> None:
    options, how, expected = CASES[case]
    _twa, clock, _the_trainer = fit(tmp_path, options, 220.0, **how)
    taken = len(clock.in_phase)
    assert abs(taken - expected) <= 1
    assert clock.now <= 220.0 + clock.slow
    assert f"trained for {taken} optimizer steps" in caplog.text, "the schedule's length"
    assert "the Trainer's time ends this run after some" in caplog.text


@pytest.mark.parametrize("options", [{"start_epoch": 0.7}, {"start_epoch": 40}])
def test_to_the_end(tmp_path, options, caplog) -> None:
    _twa, clock, _ = fit(tmp_path, options, 220.0, slow=1.2)
    assert f"trained for {len(clock.in_phase)} optimizer steps" in caplog.text, "the schedule's end"
    first = clock.in_phase[0]
    assert 145 <= first <= 165
    assert 200.0 <= clock.now <= 222.0


def test_by_default(tmp_path) -> None:
    options = {"collect": lightning_twa.CollectConfig(every_n_epochs=None)}
    twa, clock, _ = fit(tmp_path, options, 400.0, twa=lightning_twa.TWACallback, slow=2.0)
    assert twa.result is not None
    assert len(clock.in_phase) == pytest.approx(400 // 30, abs=1)


def test_a_slow_start_is_no_short_run(tmp_path) -> None:
    """By the first steps the run would be shorter than its phase."""
    _twa, clock, _ = fit(tmp_path, {"phase_steps": 30}, 400.0, start=60.0)
    assert len(clock.in_phase) == 30
    assert clock.in_phase[0] > 200


def test_a_phase_longer_than_the_run_gets_what_time_there_is(tmp_path, caplog) -> None:
    collect = CollectConfig(every_n_train_steps=2)
    _twa, clock, _ = fit(tmp_path, {"phase_steps": 500, "collect": collect}, 60.0, start=0.0)
    assert 15 <= clock.in_phase[0] <= 35
    assert 10 <= len(clock.in_phase) <= 30
    assert f"cut short after {len(clock.in_phase)} of 500 optimizer steps" in caplog.text


def test_only_the_window_s_candidates_stay(tmp_path) -> None:
    twa, clock, _ = fit(tmp_path, {"phase_steps": 6}, 220.0)
    start = clock.in_phase[0] // 4
    assert twa.candidate_names == [f"epoch={e}" for e in range(start // 2, start)]


def test_uniform_from_a_fraction_of_the_time_on(tmp_path) -> None:
    options = {"solver": SolverConfig(name="uniform"), "start_epoch": 0.75}
    twa, _, the_trainer = fit(tmp_path, options, 220.0, start=0.0)
    last = the_trainer.global_step // 4
    first = int(twa.candidate_names[0].split("=")[1])
    assert first == pytest.approx(0.75 * last, abs=1)
    assert twa.candidate_names == [f"epoch={e}" for e in range(first, last)]


def test_a_generous_limit_changes_nothing(tmp_path) -> None:
    one, _clock, _ = fit(tmp_path / "a", {"phase_steps": 5}, 1e5, max_epochs=9)
    twa = TWACallback(phase_steps=5)
    L.seed_everything(3, verbose=False)
    trainer(tmp_path / "b", callbacks=[twa], max_epochs=9).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    assert one.candidate_names == twa.candidate_names
    assert one.averaging_weights is not None
    assert one.averaging_weights.equal(twa.averaging_weights)


def test_the_window_of_averages_begins_once(tmp_path) -> None:
    """A look at the clock within the epoch in which collecting begins."""

    def averages(name: str, callbacks: list[Any]) -> list[Any]:
        L.seed_everything(3, verbose=False)
        twa = TWACallback(6, collect=CollectConfig(start=2, ema_decays=(0.9,), dense=True))
        how: dict[str, Any] = {"max_epochs": 7, "limit_train_batches": 3}  # looks at steps 4, 8
        the_trainer = trainer(tmp_path / name, callbacks=[twa, *callbacks], **how)
        the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
        return [dict(candidate.parameters) for candidate in twa._run.store]

    plain, timed = averages("plain", []), averages("timed", [Clock(1e5)])
    assert len(plain) == 5
    for one, other in zip(plain, timed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("clock", [False, True])
def test_nothing_is_placed_within_an_epoch_where_time_ends_no_run(
    tmp_path, monkeypatch, clock
) -> None:
    placed = []

    def follow(*args: Any, within_epoch: bool = False, **kwargs: Any) -> None:
        placed.append(within_epoch)
        placing.place_plans(*args, within_epoch=within_epoch, **kwargs)

    monkeypatch.setattr(stages, "place_plans", follow)
    callbacks = [TWACallback(phase_steps=4), *[Clock(1e5)] * clock]
    how: dict[str, Any] = {"max_epochs": 9, "limit_train_batches": 3}
    trainer(tmp_path, callbacks=callbacks, **how).fit(Regressor(), loader())
    assert any(placed) is clock


def test_a_resumed_run_has_the_time_that_is_left(tmp_path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 148:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, first, _ = fit(tmp_path / "a", {"phase_steps": 6}, 220.0, callbacks=[Stop()])
    again, second, _ = fit(tmp_path / "b", {"phase_steps": 6}, 220.0, ckpt=tmp_path / "half.ckpt")
    assert abs(second.in_phase[0] - first.in_phase[0]) <= 2
    assert len(second.in_phase) == 6
    assert again.candidate_names == whole.candidate_names


def test_processes_agree_although_their_clocks_do_not(tmp_path) -> None:
    class Own(Clock):
        def setup(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            self.start = 40.0 * trainer.global_rank

    twa = TWACallback(phase_steps=6)
    one, other = fit_several(tmp_path, twa, Regressor(), callbacks=[Own(260.0)], max_epochs=-1)
    phases = [[phase for phase, _ in rank["steps"]] for rank in (one, other)]
    assert phases[0] == phases[1]
    assert phases[0].count("optimize") + phases[0].count("done") == 6
    assert one["averaging_weights"].equal(other["averaging_weights"])


def test_estimates_are_few_and_grow_better() -> None:
    class Fake:
        strategy = type("S", (), {"root_device": "cpu"})
        global_step = 0
        clock = Clock(1e6, start=0.0)

        @property
        def callbacks(self) -> list[Any]:
            return [self.clock]

    fake, timed = Fake(), TimedLength()
    looks = 0
    for step in range(1, 1_000_000):
        fake.global_step, fake.clock.now = step, float(step) + min(step, 10) * 60.0
        looks += timed.is_due(fake, None)  # type: ignore[arg-type]
        timed.look(fake, None)  # type: ignore[arg-type]
        if timed.steps is not None and step >= timed.steps - 30:
            break
    assert looks < 50
    assert timed.steps == pytest.approx(1e6 - 600, abs=5)
