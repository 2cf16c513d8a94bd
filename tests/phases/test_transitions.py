"""The table of stages: every pair of stage and event, in real runs, and refused elsewhere."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.utils.data import DataLoader, IterableDataset

from helpers.common import Regressor, loader, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SolverConfig
from lightning_twa.phases.run import STAGES, Run
from lightning_twa.phases.transitions import TABLE, Event, StageName

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # other tests expect each

Triple = tuple[str, str, str]


def twa(start_epoch: int = 2, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


class In(L.Callback):
    """Does something in one hook of one epoch, once."""

    def __init__(self, hook: str, epoch: int, do: Callable[[L.Trainer, Any], object]) -> None:
        self.armed = True

        def act(trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if self.armed and trainer.current_epoch == epoch and not trainer.sanity_checking:
                self.armed = False
                do(trainer, pl_module)

        setattr(self, hook, act)


def boom(*args: Any) -> None:
    raise KeyError("boom")


def save(path: Path) -> Callable[[L.Trainer, Any], object]:
    return lambda trainer, module: trainer.save_checkpoint(path)


class Stream(IterableDataset):
    """Data without a length, or with one that is not theirs."""

    def __iter__(self) -> Any:
        return iter(regression_data())


class LongStream(Stream):
    def __len__(self) -> int:
        return 100


def stream(kind: type[Stream] = Stream) -> DataLoader:
    return DataLoader(kind(), batch_size=16)


class Bench:
    """Runs of every kind, of which each transition is recorded."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.seen: set[Triple] = set()
        tell = Run.tell

        def telling(run: Run, event: Event, *arguments: Any) -> None:
            before = run.stage.name
            tell(run, event, *arguments)
            self.seen.add((before.value, event.value, run.stage.name.value))

        monkeypatch.setattr(Run, "tell", telling)

    def fit(
        self,
        *callbacks: L.Callback,
        train: Any = loader,
        again: bool = False,
        then: Callable[[L.Trainer, Any], object] | None = None,
        ckpt_path: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """One fit, from a checkpoint or not; a second with the same Trainer, or something else
        then.
        """
        the_trainer = trainer(self.path, **{"callbacks": [*callbacks], "max_epochs": 4, **kwargs})
        module = Regressor()
        with contextlib.suppress(KeyError):
            the_trainer.fit(module, train(), loader(32, seed=1), ckpt_path=ckpt_path)
        if then is not None:
            then(the_trainer, module)
        if again:
            the_trainer.fit(module, train(), loader(32, seed=1))

    def stopped(self, hook: str, make: Callable[[], TWACallback]) -> None:
        """Stopped in epoch 2, by a callback before or behind ours, and saved at the epoch's end."""

        def saver() -> In:
            return In("on_train_epoch_end", 2, save(self.path / "stopped.ckpt"))

        self.fit(In(hook, 2, stop), make(), saver())
        self.fit(make(), In(hook, 2, stop), saver())
        self.fit(saver(), make(), In(hook, 2, stop))
        self.fit(make(), In(hook, 2, stop))


def stop(trainer: L.Trainer, *args: Any) -> None:
    trainer.should_stop = True


def without_a_phase(bench: Bench) -> None:
    """Collecting to the end: interrupted and gone on with, saved from, and with uniform averages
    that end at every moment.
    """
    path = bench.path / "collecting.ckpt"
    bench.fit(twa(8), In("on_train_epoch_end", 1, save(path)), max_epochs=9, max_steps=12)
    bench.fit(twa(8), ckpt_path=path, max_epochs=9, max_steps=12)
    for hook in ("on_train_start", "on_train_batch_end"):
        interrupt = In(hook, 0 if hook == "on_train_start" else 1, boom)
        bench.fit(twa(8), interrupt, max_epochs=9, then=save(path), again=True)

    def uniform() -> TWACallback:
        return twa(1, solver=SolverConfig(name="uniform"))

    bench.fit(uniform())
    bench.fit(uniform(), train=stream)  # the end is known when an epoch has ended
    for hook in ("on_train_batch_end", "on_validation_end", "on_train_epoch_end"):
        bench.stopped(hook, uniform)


def with_a_phase(bench: Bench) -> None:
    """A phase that ends at every moment; interrupted, gone on with, resumed, saved from."""
    first, path, done = (bench.path / f"{name}.ckpt" for name in ("first", "phase", "done"))
    savers = [In("on_train_epoch_end", 0, save(first)), In("on_train_epoch_end", 2, save(path))]
    bench.fit(twa(), *savers, then=save(done))
    for hook in ("on_train_batch_end", "on_validation_end", "on_train_epoch_end"):
        bench.stopped(hook, twa)
    bench.fit(twa(), train=stream, max_steps=100)
    bench.fit(twa(0, collect=CollectConfig(checkpoints=[str(first), str(path)])))
    for hook, epoch in (("on_fit_start", 0), ("on_train_start", 2), ("on_train_batch_end", 3)):
        bench.fit(twa(), In(hook, epoch, boom), ckpt_path=path, again=True)
    bench.fit(twa(), In("on_train_batch_end", 2, boom), then=save(bench.path / "x.ckpt"))
    bench.fit(twa(), In("on_fit_start", 0, save(bench.path / "x.ckpt")), ckpt_path=path)
    bench.fit(twa(), ckpt_path=path, max_epochs=3)  # nothing is left to be trained
    bench.fit(twa(), In("on_train_batch_end", 2, leave_as_a_tuner))
    late = bench.path / "late.ckpt"  # of the last batch: the next epoch has no start
    saver = ModelCheckpoint(bench.path, "late", every_n_train_steps=16)
    bench.fit(twa(), saver, enable_checkpointing=True)
    going_on = TWACallback(6, collect=CollectConfig(start=0), continue_from="average")
    bench.fit(going_on, ckpt_path=late, max_epochs=8)
    bench.fit(TWACallback(phase_steps=2), max_epochs=6)  # it begins within an epoch
    bench.fit(twa(), In("on_train_epoch_start", 3, lambda t, _: back_to(t, path)))
    bench.fit(twa(), again=True)
    bench.fit(twa(), then=one_epoch_more)
    bench.fit(twa(), In("on_train_batch_end", 2, boom), then=other_settings)
    for other in (first, path, done):
        state = torch.load(other, weights_only=True)["callbacks"]["TWACallback"]
        for epoch in (2, 9):  # interrupted, or done
            bench.fit(
                twa(),
                In("on_train_batch_end", epoch, boom),
                then=lambda t, m, ckpt=other: t.fit(m, loader(), loader(32), ckpt_path=ckpt),
            )
        bench.fit(
            twa(),
            In("on_train_batch_end", 2, boom),
            then=lambda t, m, state=state: t.callbacks[0].load_state_dict(state),
        )


def back_to(the_trainer: L.Trainer, path: Path) -> None:
    """As the learning rate finder does."""
    the_trainer._checkpoint_connector.restore(path)


def leave_as_a_tuner(*args: Any) -> None:
    raise _TunerExitException


def one_epoch_more(the_trainer: L.Trainer, module: Any) -> None:
    the_trainer.fit_loop.max_epochs += 1
    with pytest.raises(RuntimeError, match="was finished, but the Trainer goes on with epoch 4"):
        the_trainer.fit(module, loader(), loader(32))


def other_settings(the_trainer: L.Trainer, module: Any) -> None:
    callback = the_trainer.callbacks[0]
    callback._run.averaging.settings = twa(solver=SolverConfig(radius=1.0)).settings
    with pytest.raises(
        ValueError, match=r"^The phase that was interrupted was started with radius"
    ):
        the_trainer.fit(module, loader(), loader(32))


def with_cycles(bench: Bench) -> None:
    """Cycles, resumed at their ends."""
    path = bench.path / "cycle.ckpt"
    for hook in ("on_train_batch_end", "on_train_epoch_end"):
        saver = In(hook, 2, save(path))
        bench.fit(saver, twa(cycles=2), max_epochs=6)
        bench.fit(twa(cycles=2), ckpt_path=path, max_epochs=6)
        bench.fit(twa(cycles=2), saver, max_epochs=6)
        bench.fit(twa(cycles=2), ckpt_path=path, max_epochs=6)
    bench.fit(twa(cycles=2), train=lambda: stream(LongStream), max_epochs=6)
    bench.fit(twa(cycles=2), In("on_train_epoch_end", 2, save(path)), max_epochs=8)
    bench.fit(twa(cycles=2), ckpt_path=path, max_epochs=6)  # the cycle has become shorter
    resets = In("on_train_epoch_end", 2, lambda t, m: setattr(t, "should_stop", False))
    bench.fit(In("on_train_batch_end", 2, stop), twa(cycles=2), resets, max_epochs=8)


PAIRS = list(itertools.product(StageName, Event))


@pytest.mark.parametrize(
    ("stage", "event"), [(s, e) for s, e in PAIRS if s not in TABLE[e]], ids=lambda x: x.value
)
def test_an_event_that_does_not_belong_to_a_stage_is_refused(stage, event) -> None:
    run = Run(twa().settings)
    run.stage = STAGES[stage](run.averaging)
    before = run.stage
    message = f"the event '{event.value}' came in stage {stage.value}, but it belongs to "
    with pytest.raises(RuntimeError, match=message):
        run.tell(event, None, None)
    assert run.stage is before


def test_a_stage_that_the_table_does_not_let_follow_is_refused(monkeypatch) -> None:
    run = Run(twa().settings)
    monkeypatch.setattr(type(run.stage), "batch_begins", lambda *arguments: StageName.SUSPENDED)
    message = "stage Suspended cannot follow Collecting by the event 'batch_begins'"
    with pytest.raises(RuntimeError, match=message):
        run.tell(Event.BATCH_BEGINS, None, None)
    assert run.stage.name is StageName.COLLECTING


def test_every_stage_answers_every_event_that_its_rows_name() -> None:
    assert set(TABLE) == set(Event)
    assert set(STAGES) == set(StageName)
    for stage, event in PAIRS:
        assert callable(getattr(STAGES[stage], event.value))


def test_every_transition_of_the_table_happens_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    without_a_phase(bench)
    with_a_phase(bench)
    with_cycles(bench)
    table = {
        (before.value, event.value, after.value)
        for event, rows in TABLE.items()
        for before, following in rows.items()
        for after in following
    }
    assert bench.seen <= table, "Run.tell checks it"
    assert sorted(table - bench.seen) == []
