"""Interrupted, and fitted again with the same Trainer: what was there is there."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import signal
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

import lightning_twa
from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from helpers.runs import is_borrowed
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig, SubspaceOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class Interrupt(L.Callback):
    """Raises after so many optimizer steps, once; before that it notes what there is."""

    def __init__(self, step: int, error: type[BaseException] = KeyError) -> None:
        self.step, self.error = step, error
        self.noted: Any = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and self.noted is None:
            self.noted = note(trainer, pl_module)
            raise self.error


class AtStart(L.Callback):
    """Notes what there is when training starts, behind TWA."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.noted.append(note(trainer, pl_module))


def note(trainer: L.Trainer, module: Any) -> Any:
    """Weights, and the state and the settings of the optimizer that steps."""
    (callback,) = (c for c in trainer.callbacks if isinstance(c, lightning_twa.TWACallback))
    optimizer = callback._run.optimization.optimizer or trainer.optimizers[0]
    assert is_borrowed(trainer) == isinstance(optimizer, SubspaceOptimizer)
    lrs = [group["lr"] for group in optimizer.param_groups]
    return type(optimizer).__name__, copy.deepcopy(optimizer.state_dict()), lrs, weights(module)


def twa(start_epoch: int = 4, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


def fit(the_trainer: L.Trainer, module: Any, **kwargs: Any) -> None:
    """A fit that may be interrupted."""
    with contextlib.suppress(KeyError, SystemExit):
        the_trainer.fit(module, loader(), loader(32, seed=1), **kwargs)


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "bits": {"subspace": SubspaceConfig(bits=3, blocks="tensor")},
    "simplex": {"subspace": SubspaceConfig(parametrization="simplex")},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "sgd": {
        "subspace": SubspaceConfig(basis="candidates"),
        "solver": SolverConfig(name="sgd", lr=0.1, sam_rho=0.1),
    },
    "adamw": {"solver": SolverConfig(name="adamw")},
    "data": {"data": "val"},
    "disk": {"storage": StorageConfig(kind="disk")},
    "averages": {"collect": CollectConfig(start=0, ema_decays=(0.5, 0.9))},
    "cycle": {"start_epoch": 2, "cycles": 2},
}


@pytest.mark.matrix(9)
@pytest.mark.parametrize("step", [17, 22])
@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_goes_on_with_what_it_had(tmp_path: Path, kind: str, step: int) -> None:
    callback, interrupt, start = twa(**KINDS[kind]), Interrupt(step), AtStart()
    module = Regressor(batchnorm=True)
    the_trainer = trainer(tmp_path, callbacks=[callback, start, interrupt], max_epochs=8)
    if kind == "cycle":  # its phases are of two epochs
        interrupt.step = step = step - 8
    fit(the_trainer, module)
    assert callback.phase == "optimize"
    learned, path = callback.averaging_weights, callback.averaging_path
    fit(the_trainer, module)
    assert equal(start.noted[1], interrupt.noted)
    assert start.noted[1][0] == "SubspaceOptimizer"
    assert callback.phase == "done"
    assert torch.equal(callback.averaging_path[: len(path)], path) or kind == "cycle"
    assert kind == "mask" or not torch.equal(callback.averaging_weights, learned)


def test_the_interrupted_run_is_the_uninterrupted_one_but_for_the_epoch_begun_again(
    tmp_path: Path,
) -> None:
    """At the end of an epoch nothing is begun again."""

    class AtEnd(L.Callback):
        armed = True

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if self.armed and trainer.current_epoch == 5:
                self.armed = False

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if not self.armed:
                self.armed = True
                raise KeyError

    whole, parts = Regressor(batchnorm=True), Regressor(batchnorm=True)
    parts.load_state_dict(whole.state_dict())
    trainer(tmp_path, callbacks=[twa()], max_epochs=8).fit(whole, loader())
    at_end = AtEnd()
    the_trainer = trainer(tmp_path, callbacks=[twa(), at_end], max_epochs=8)
    for _ in range(2):
        with contextlib.suppress(KeyError):
            the_trainer.fit(parts, loader())
    assert the_trainer.global_step == 32
    assert equal(dict(parts.state_dict()), dict(whole.state_dict()))


@pytest.mark.matrix(2)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, MemoryError, SystemExit])
def test_nothing_big_is_kept_after_an_interruption(tmp_path: Path, error: Any) -> None:
    callback = twa(collect=CollectConfig(start=0, ema_decays=(0.9,)))
    held: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            optimizer = callback._run.optimization.optimizer
            if callback.phase == "optimize" and not held:
                held.append(weakref.ref(optimizer))
                held.append(weakref.ref(optimizer.subspace))
                held.append(weakref.ref(optimizer.subspace.stored))
                held.append(weakref.ref(optimizer.subspace.center))

    module, before = Regressor(), signal.getsignal(signal.SIGINT)
    the_trainer = trainer(tmp_path, callbacks=[callback, Look(), Interrupt(18, error)])
    try:
        the_trainer.fit(module, loader())
    except BaseException as caught:
        caught.__traceback__ = None
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    gc.collect()
    assert [what() for what in held] == [None] * 4
    assert callback.phase == "optimize"
    assert callback.averaging_weights.shape == (5, 1)
    assert not is_borrowed(the_trainer)
    the_trainer.fit(module, loader())
    assert callback.phase == "done"


def test_running_averages_wait_in_main_memory(tmp_path: Path, monkeypatch: Any) -> None:
    collect = CollectConfig(start=0, ema_decays=(0.9,), power_averages=(0.1,))
    callback = twa(collect=collect)
    moved = []
    averages = callback._run.averaging.collector.averages
    monkeypatch.setattr(type(averages._ema), "move_to", lambda self, device: moved.append(device))
    monkeypatch.setattr(type(averages._power), "release_device", lambda self: moved.append("sums"))
    fit(trainer(tmp_path, callbacks=[callback, Interrupt(6)]), Regressor())
    assert moved == ["cpu", "cpu", "sums"], "exponential averages, means, power averages"
    assert callback.phase == "collect"


@pytest.mark.parametrize("step", [6, 18])
def test_another_model_is_refused_and_the_first_goes_on(tmp_path: Path, step: int) -> None:
    callback, module = twa(), Regressor()
    the_trainer = trainer(tmp_path, callbacks=[callback, Interrupt(step)])
    fit(the_trainer, module)
    names, learned = callback.candidate_names, callback.averaging_weights
    message = r"was of another Regressor object than the one that fit\(\) got now.*new Trainer"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            the_trainer.fit(Regressor(), loader())
        assert callback.candidate_names == names
        assert learned is None or torch.equal(callback.averaging_weights, learned)
    the_trainer.fit(module, loader())
    assert callback.phase == "done"
    assert callback.candidate_names[: len(names)] == names


@pytest.mark.parametrize("step", [6, 18])
def test_a_model_that_is_gone_is_another_one(tmp_path: Path, step: int) -> None:
    callback = twa()
    the_trainer = trainer(tmp_path, callbacks=[callback, Interrupt(step)])
    fit(the_trainer, Regressor())
    the_trainer.strategy._lightning_module = the_trainer.strategy.model = None
    gc.collect()
    with pytest.raises(ValueError, match="was of another Regressor object"):
        the_trainer.fit(Regressor(), loader())


@pytest.mark.parametrize("step", [6, 18])
def test_a_checkpoint_takes_the_place_of_what_was_interrupted(tmp_path: Path, step: int) -> None:
    """Also for another model."""
    path = tmp_path / "second.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0 and not path.exists():
                trainer.save_checkpoint(path)

    callback, other = twa(), Regressor()
    the_trainer = trainer(tmp_path, callbacks=[callback, Save(), Interrupt(step)])
    fit(the_trainer, Regressor())
    the_trainer.fit(other, loader(), ckpt_path=path)
    assert callback.phase == "done"
    assert callback.candidate_names == [f"epoch={e}" for e in range(4)]
    mean = sum(
        float(w) * c.parameters["net.0.weight"].double()
        for w, c in zip(callback.averaging_weights[:, 0], callback.candidates, strict=True)
    )
    assert torch.allclose(other.net[0].weight.double(), mean, atol=1e-6)


@pytest.mark.parametrize("step", [6, 18])
def test_a_checkpoint_without_candidates_begins_the_run_anew(tmp_path: Path, step: int) -> None:
    path = tmp_path / "none.ckpt"
    trainer(tmp_path, max_epochs=1).fit(first := Regressor(), loader())
    first.trainer.save_checkpoint(path)
    callback, module = twa(collect=CollectConfig(start=2)), Regressor()
    the_trainer = trainer(tmp_path, callbacks=[callback, Interrupt(step)])
    fit(the_trainer, module)
    the_trainer.fit(module, loader(), ckpt_path=path)
    assert callback.phase == "done"
    assert callback.candidate_names == ["epoch=2", "epoch=3"]


def test_candidates_of_collecting_are_kept_and_taken_once(tmp_path: Path) -> None:
    callback = twa(3, collect=CollectConfig(start=0, every_n_train_steps=2, ema_decays=(0.5,)))
    the_trainer = trainer(tmp_path, callbacks=[callback, Interrupt(7)])
    module = Regressor()
    fit(the_trainer, module)
    assert callback.candidate_names == ["step=2", "step=4", "step=6"]
    fit(the_trainer, module)
    names = [n for n in callback.candidate_names if not n.startswith("ema")]
    assert names == [f"step={s}" for s in range(2, 15, 2)]
    assert len(set(callback.candidate_names)) == len(callback.candidate_names)


def test_early_stopping_that_wanted_to_end_the_run_is_remembered(tmp_path: Path) -> None:
    class Boom(L.Callback):
        armed = True

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if self.armed and trainer.current_epoch == 2:
                self.armed = False
                raise KeyError

    callback = twa(5, start_on_early_stopping=True)
    stopper = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    the_trainer = trainer(tmp_path, callbacks=[Boom(), callback, stopper], max_epochs=8)
    module = Regressor()
    fit(the_trainer, module)
    fit(the_trainer, module)
    assert callback.phase == "done"
    assert callback.candidate_names == ["epoch=0", "epoch=1"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("step", [6, 18, 99])
def test_a_callback_that_was_interrupted_or_has_finished_can_be_copied(
    tmp_path: Path, step: int, copied: Any
) -> None:
    callback, module = twa(collect=CollectConfig(start=0, ema_decays=(0.5,))), Regressor()
    fit(trainer(tmp_path, callbacks=[callback, Interrupt(step)]), module)
    again = copied(callback)
    assert again.phase == callback.phase
    assert again.candidate_names == callback.candidate_names
    assert equal(again.state_dict(), callback.state_dict())


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start"]
)
def test_a_second_interruption_before_the_phase_is_entered_again_loses_nothing(
    tmp_path: Path, hook: str
) -> None:
    class Boom(L.Callback):
        armed = False

    def act(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if Boom.armed:
            Boom.armed = False
            raise KeyError

    setattr(Boom, hook, lambda self, *args, **kwargs: act(*args, **kwargs))
    for first in (True, False):
        callback, module, interrupt = twa(), Regressor(), Interrupt(18)
        others = [Boom(), callback] if first else [callback, Boom()]
        start = AtStart()
        the_trainer = trainer(tmp_path, callbacks=[*others, start, interrupt])
        fit(the_trainer, module)
        Boom.armed = True
        fit(the_trainer, module)
        assert not Boom.armed
        assert callback.phase == "optimize"
        fit(the_trainer, module)
        assert equal(start.noted[-1], interrupt.noted)
        assert callback.phase == "done"
