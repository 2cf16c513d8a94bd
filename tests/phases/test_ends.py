"""However a run ends, its last checkpoint holds the result, and so does the file of the average."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader, IterableDataset

from helpers.common import Regressor, loader, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import SolverConfig, SubspaceConfig

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "cycles": {"start_epoch": 2, "cycles": 2},
    "validated": {"validate_average": True},
}


class Claims(IterableDataset):
    """Says that it has another number of samples than it gives."""

    def __init__(self, length: int) -> None:
        self.length, self.data = length, regression_data(64)

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return (self.data[i] for i in range(64))


class StopIn(L.Callback):
    """Sets ``should_stop`` in a hook, at the first chance in epoch 6."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 6:
            trainer.should_stop = True


class NoTime(Timer):
    """Has none left from epoch 6 on."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 6:
            self._duration = 0.0


ENDS: dict[str, Any] = {
    "epochs": ({}, None, []),
    "steps": ({"max_steps": 27}, None, []),
    "steps in a window": ({"max_steps": 14, "accumulate_grad_batches": 2}, None, []),
    "limited": ({"limit_train_batches": 3, "limit_val_batches": 1}, None, []),
    "claims more": ({}, Claims(80), []),
    "claims less": ({}, Claims(48), []),
    "no time": ({}, None, [lambda: NoTime({"hours": 1})]),
    "no time in an epoch": ({}, None, [lambda: NoTime({"hours": 1}, "epoch")]),
    "early": ({}, None, [lambda: EarlyStopping("val_loss", patience=6, min_delta=9.0)]),
    "validates seldom": ({"check_val_every_n_epoch": 3}, None, []),
    "validates often": ({"val_check_interval": 0.5}, None, []),
    "validates never": ({"limit_val_batches": 0}, None, []),
    **{
        f"stopped in {hook}": ({}, None, [lambda hook=hook: StopIn(hook)])
        for hook in (
            "on_train_batch_start",
            "on_train_batch_end",
            "on_validation_start",
            "on_validation_end",
            "on_train_epoch_end",
            "on_train_epoch_start",
        )
    },
}
SAVERS: dict[str, dict[str, Any]] = {
    "last": {"save_last": True},
    "every step": {"save_last": True, "every_n_train_steps": 1},
    "alone": {"save_last": True, "every_n_train_steps": 1, "save_weights_only": True},
    "link": {"save_last": "link", "every_n_train_steps": 1, "save_top_k": -1},
}
QUICK = {
    ("default", "every step"),
    ("cycles", "alone"),
}
MATRIX = [
    pytest.param(k, e, s, first, marks=[] if quick else pytest.mark.long)
    for k in KINDS
    for s in SAVERS
    for e in ENDS
    for first in (True, False)
    if (quick := (k, s) in QUICK and not first) or k in ("default", "uniform") or s == "every step"
    if not (k == "mask" and "window" in e)  # which refuses to accumulate
]


def result_of(tmp_path: Path, kind: str, end: str, saves: str, first: bool) -> Any:
    """A run with the callback before or behind those that end it."""
    L.seed_everything(1, verbose=False)
    options, data, makers = ENDS[end]
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    others = [make() for make in makers]
    saver = ModelCheckpoint(tmp_path, "{step}", **SAVERS[saves])
    callbacks = [*others, twa] if first else [twa, *others]
    module = Regressor(batchnorm=True)
    the_trainer = trainer(
        tmp_path, callbacks=[*callbacks, saver], enable_checkpointing=True, max_epochs=8, **options
    )
    train = loader() if data is None else DataLoader(data, batch_size=16)
    the_trainer.fit(module, train, loader(32, seed=1))
    assert twa.phase == "done"
    return the_trainer, twa, state(module)


@pytest.mark.matrix(10)
@pytest.mark.filterwarnings(
    "ignore:Training stopped in part",
    "ignore:Your `IterableDataset` has `__len__`",
    "ignore:Length of IterableDataset",
)
@pytest.mark.parametrize(("kind", "end", "saves", "first"), MATRIX)
def test_the_last_checkpoint_is_the_result(
    tmp_path: Path, kind: str, end: str, saves: str, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was written earlier, or that is another file's link, a line tells of."""
    caplog.set_level(logging.INFO, "lightning.pytorch")
    the_trainer, twa, final = result_of(tmp_path, kind, end, saves, first)
    path = the_trainer.checkpoint_callbacks[0].last_model_path
    held = torch.load(path, weights_only=True)
    if equal(dict(held["state_dict"]), final):
        if saves != "alone":
            assert held["callbacks"][twa.state_key]["phase"] == "done"
    else:
        assert held["global_step"] < the_trainer.global_step or saves == "link"
        assert re.search(r"(best|last)_model_path .* holds other weights", caplog.text)
    assert equal(dict(torch.load(twa.average_path, weights_only=True)["state_dict"]), final)


class StopsLate(L.Callback):
    """Ends the run behind the last checkpoint."""

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 6


class FailsFor(TorchCheckpointIO):
    """Cannot write some files."""

    def __init__(self, part: str) -> None:
        self.part = part

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.part in Path(path).name:
            raise OSError("planned: no space left")
        super().save_checkpoint(checkpoint, path, storage_options)


class InThread(AsyncCheckpointIO):
    """Keeps what it is given; Lightning's own replaces it by its default. Slow, as a disk is."""

    def __init__(self, inner: TorchCheckpointIO) -> None:
        super().__init__(inner)
        self.inner = inner

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "_ensure_setup"):  # Lightning 2.5 makes the thread at once
            self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(time.sleep, 0.02)
        super().save_checkpoint(*args, **kwargs)

    @property
    def checkpoint_io(self) -> Any:
        return self.inner

    @checkpoint_io.setter
    def checkpoint_io(self, value: Any) -> None:
        pass


@pytest.mark.matrix(2)
@pytest.mark.filterwarnings("ignore:The average could not be written")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("end", ["epochs", "late"])
def test_a_thread_that_writes_checkpoints_does_not_miss_the_result(
    tmp_path: Path, end: str, fails: bool
) -> None:
    plugin = InThread(FailsFor(".twa" if fails else "nothing"))
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    saver = ModelCheckpoint(tmp_path, "{step}", save_last=True, every_n_train_steps=1)
    module = Regressor(batchnorm=True)
    the_trainer = trainer(
        tmp_path,
        callbacks=[twa, saver, *([StopsLate()] if end == "late" else [])],
        enable_checkpointing=True,
        max_epochs=8,
        plugins=[plugin],
        limit_val_batches=0,
    )
    the_trainer.fit(module, loader())
    assert twa.phase == "done"
    for path in [tmp_path / "last.ckpt", *([] if fails else [Path(str(twa.average_path))])]:
        assert equal(dict(torch.load(path, weights_only=True)["state_dict"]), state(module))
    assert (twa.average_path is None) is fails
    assert not list(tmp_path.glob(".*"))
    assert the_trainer.strategy.checkpoint_io is plugin


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_last_checkpoint_with_the_right_weights_is_of_a_finished_run(
    tmp_path: Path, batchnorm: bool
) -> None:
    """Saved before the end was known, when the model held the average already."""
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module = Regressor(batchnorm=batchnorm)
    the_trainer = trainer(
        tmp_path,
        callbacks=[twa, StopIn("on_train_epoch_start"), saver],
        enable_checkpointing=True,
        max_epochs=8,
    )
    the_trainer.fit(module, loader(), loader(32, seed=1))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["callbacks"][twa.state_key]["phase"] == "done"
    assert equal(dict(last["state_dict"]), state(module))


UNSEEN = "TWA: no validation of this run saw the average"


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")
@pytest.mark.parametrize(
    ("limits", "seen"),
    [
        ({"max_epochs": 6}, True),
        ({"max_epochs": 6, "limit_val_batches": 0}, True),
        ({"max_epochs": 7, "check_val_every_n_epoch": 3}, False),
        ({"max_epochs": -1, "max_steps": 22}, False),
        ({"max_epochs": 6, "start": 4}, False),  # it ends when the phase has taken its steps
    ],
    ids=str,
)
def test_who_has_not_validated_the_average_is_told(tmp_path, caplog, limits, seen) -> None:
    limits = dict(limits)
    twa, module = TWACallback(limits.pop("start", None), phase_steps=2), Regressor()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer(tmp_path, callbacks=[twa], **limits).fit(module, loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert [UNSEEN in text for text in caplog.messages].count(True) == (not seen)
