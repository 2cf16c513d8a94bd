"""``copy.deepcopy`` and ``pickle`` of the callback, at every moment of a run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import StorageConfig, SubspaceConfig, average, plot_subspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:You are using .torch.load. with"),  # torch 2.4, unpickling
]

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
EVERY_WAY = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def twa(start_epoch: int = 4, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "disk": {"storage": StorageConfig(kind="disk")},
    "averages": {"collect": CollectConfig(start=0, ema_decays=(0.5,))},
    "cycles": {"start_epoch": 2, "cycles": 2},
    "groups": {"subspace": SubspaceConfig(group_size=2, bits=4, blocks="tensor")},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "val": {"data": "val"},
    "validated": {"validate_average": True},
    "early stopping": {"start_epoch": 7, "start_on_early_stopping": True},
}


def told(callback: TWACallback) -> dict[str, Any]:
    """What a user reads of it, and its state."""
    done = callback.phase == "done"
    return {
        "phase": callback.phase,
        "names": callback.candidate_names,
        "blocks": callback.block_names,
        "weights": callback.averaging_weights,
        "way": callback.averaging_path,
        "path": callback.average_path,
        "further": callback.further_names,
        "average": callback.average_state_dict() if done else None,
        "state": copy.deepcopy(callback.state_dict()),
    }


def same(a: Any, b: Any) -> bool:
    """Equal, also where there is nothing."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and equal(a, b)


class Copies(L.Callback):
    """Copies another callback in hooks of its own, and compares the copies with it."""

    def __init__(self, original: TWACallback, copied: Any, look: bool = True) -> None:
        self.original, self.copied, self.look = original, copied, look
        self.made: dict[str, TWACallback] = {}

    def _copy(self, hook: str, trainer: L.Trainer) -> None:
        if not self.look:
            return
        again = self.copied(self.original)
        assert same(told(again), told(self.original)), (hook, trainer.global_step)
        assert not again._fitting
        self.made[f"{hook}, {again._run.stage.name.value}"] = again


def _hook(name: str) -> Any:
    def act(self: Copies, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            self._copy(name, trainer)

    return act


HOOKS = (
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
)
for hook in HOOKS:
    setattr(Copies, hook, _hook(hook))


def fit(tmp_path: Path, kind: str, copied: Any, look: bool) -> Any:
    """A run that is copied in every hook, or not."""
    L.seed_everything(3, verbose=False)
    callback, module = twa(**KINDS[kind]), Regressor(batchnorm=True)
    copies = Copies(callback, copied, look)
    stoppers = [EarlyStopping("val_loss", patience=1, min_delta=1e9)] if "early" in kind else []
    the_trainer = trainer(tmp_path, callbacks=[callback, *stoppers, copies], max_epochs=8)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    return callback, module, copies.made


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("copied", "kind"),
    [
        *((copy.deepcopy, kind) for kind in KINDS),
        (COPIES["pickle"], "default"),
        *(pytest.param(COPIES["pickle"], kind, marks=pytest.mark.long) for kind in [*KINDS][1:]),
    ],
)
def test_a_copy_in_every_hook_is_equal_and_disturbs_nothing(tmp_path, kind, copied) -> None:
    callback, module, made = fit(tmp_path / "a", kind, copied, True)
    plain, other, _ = fit(tmp_path / "b", kind, copied, False)
    assert callback.phase == plain.phase == "done"
    assert equal(state(module), state(other))
    assert torch.equal(callback.averaging_weights, plain.averaging_weights)
    for moment in ("setup, Collecting", "on_train_epoch_end, Suspended", "on_train_end, Done"):
        assert moment in made


LONG = pytest.mark.long
MOMENTS = (
    "setup, Collecting",
    "on_train_epoch_end, Suspended",  # in the phase
    "on_validation_batch_end, Suspended",
    "on_train_end, Done",
    "teardown, Done",
)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("disk", marks=LONG), "validated", pytest.param("early stopping", marks=LONG)],
)
def test_a_copy_in_another_trainer_begins_anew(tmp_path, kind) -> None:
    expected, module, made = fit(tmp_path, kind, copy.deepcopy, True)
    for moment in MOMENTS:
        L.seed_everything(3, verbose=False)
        callback, again = made[moment], Regressor(batchnorm=True)
        stop = [EarlyStopping("val_loss", patience=1, min_delta=1e9)] if "early" in kind else []
        trainer(tmp_path, callbacks=[callback, *stop], max_epochs=8).fit(
            again, loader(), loader(32, seed=1)
        )
        assert callback.phase == "done"
        assert callback.candidate_names == expected.candidate_names
        assert equal(state(again), state(module)), moment


@EVERY_WAY
@pytest.mark.parametrize("step", [6, 18])
def test_a_copy_of_what_was_interrupted_and_of_what_is_resumed(tmp_path, step, copied) -> None:
    class Boom(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "c.ckpt")
                raise KeyError

    callback = twa(collect=CollectConfig(start=0, ema_decays=(0.5,)))
    with pytest.raises(KeyError):
        trainer(tmp_path, callbacks=[callback, Boom()]).fit(Regressor(), loader())
    again = copied(callback)
    assert again._run.stage.name.value == "Suspended"
    assert same(told(again), told(callback))
    twice = copied(again)
    assert same(told(twice), told(callback))
    resumed, module = twa(collect=CollectConfig(start=0, ema_decays=(0.5,))), Regressor()
    copies = Copies(resumed, copied)
    trainer(tmp_path, callbacks=[resumed, copies]).fit(
        module, loader(), ckpt_path=tmp_path / "c.ckpt"
    )
    assert resumed.phase == "done"
    state_dict = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["TWACallback"]
    loaded = twa(collect=CollectConfig(start=0, ema_decays=(0.5,)))
    loaded.load_state_dict(state_dict)
    assert same(told(copied(loaded)), told(loaded)), "read, and in no Trainer yet"


@EVERY_WAY
def test_a_copy_of_a_run_whose_phase_has_failed(tmp_path, monkeypatch, copied) -> None:
    from lightning_twa.phases import span

    def planned(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planned")

    monkeypatch.setattr(span, "build_subspace", planned)
    callback = twa()
    copies = Copies(callback, copied)
    copies._copy = lambda hook, trainer: copies.made.update({hook: copied(callback)})  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="The TWA phase could not begin"):
        trainer(tmp_path, callbacks=[callback, copies], min_epochs=6).fit(Regressor(), loader())
    assert copies.made["on_train_end"].phase == "done"
    assert copies.made["on_train_batch_start"].phase == "collect", "which tries the phase again"
    assert copies.made["on_train_batch_start"].num_candidates == 4


class Large(Regressor):
    """A million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 1))


@pytest.mark.parametrize("kind", ["default", "disk", "validated", "averages"])
def test_a_finished_callback_pickles_small(tmp_path, kind) -> None:
    """Without candidates, and without the average, which a file holds."""
    callback, module = twa(2, **KINDS[kind], save_average=str(tmp_path / "a.ckpt")), Large()
    the_trainer = trainer(tmp_path, callbacks=[callback], max_epochs=3, limit_train_batches=2)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    data = pickle.dumps(callback)
    assert len(data) < 2**14
    again = pickle.loads(data)
    assert again.candidate_names == callback.candidate_names
    assert again.candidates == []
    assert len(callback.candidates) == callback.num_candidates
    assert equal(again.average_state_dict(), state(module))
    with pytest.raises(ValueError, match="restored or copied after its end"):
        average(again)
    with pytest.raises(ValueError, match="that was restored from a checkpoint, or copied, has no"):
        plot_subspace(again, module, loader())


def test_the_average_travels_where_no_file_has_it(tmp_path) -> None:
    callback, module = twa(2, save_average=False), Large()
    the_trainer = trainer(tmp_path, callbacks=[callback], max_epochs=3, limit_train_batches=2)
    the_trainer.fit(module, loader())
    data = pickle.dumps(callback)
    size = sum(p.nbytes for p in module.parameters())
    assert size < len(data) < size + 2**14
    assert equal(pickle.loads(data).average_state_dict(), state(module))


def test_deepcopy_of_the_trainer_s_callbacks_while_early_stopping_is_watched(tmp_path) -> None:
    """Ours must not drag the Trainer along, whatever it watches."""
    sizes: list[int] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            sizes.append(len(pickle.dumps(callback)))

    callback = twa(7, start_on_early_stopping=True)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    stop = EarlyStopping("val_loss", patience=50)
    trainer(
        tmp_path, callbacks=[callback, stop, saver, Look()], max_epochs=8, enable_checkpointing=True
    ).fit(Regressor(), loader(), loader(32, seed=1))
    assert max(sizes) < 2**15


def test_a_copy_leaves_the_model_where_an_average_is_in_its_place(tmp_path) -> None:
    callback, module = twa(validate_average=True), Regressor(batchnorm=True)
    seen: list[Any] = []

    class Look(L.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            before = weights(module)
            seen.append(copy.deepcopy(callback))
            assert torch.equal(weights(module), before)

    trainer(tmp_path, callbacks=[callback, Look()]).fit(module, loader(), loader(32, seed=1))
    assert all(c._run.averaging.temporary._raw is None for c in seen)
