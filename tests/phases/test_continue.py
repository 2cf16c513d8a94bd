"""A finished run that is trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from helpers.short import holds_its_average
from lightning_twa import SolverConfig, StorageConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:TWACallback.data='val'. trains",
    "ignore:.*callbacks used to create the checkpoint need to be",
)

KINDS = {
    "phase": {},
    "val": {"data": "val"},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "files": {"storage": StorageConfig(kind="disk")},
    "averages": {"collect": CollectConfig(ema_decays=(0.9,))},
    "window": {"collect": CollectConfig(max_candidates=2)},
}


class Notes(Regressor):
    """Notes weights and buffers at the start and at the end of epochs."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.starts: dict[int, dict[str, Tensor]] = {}
        self.ends: dict[int, dict[str, Tensor]] = {}

    def now(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state_dict().items()}

    def on_train_epoch_start(self) -> None:
        self.starts[self.trainer.current_epoch] = self.now()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends[self.trainer.current_epoch] = self.now()


def fit(
    path: Path, kind: str, start: Any, epochs: int, ckpt: Any = None
) -> tuple[TWACallback, Notes, L.Trainer]:
    L.seed_everything(4, verbose=False)
    twa = TWACallback(**{"start_epoch": 0.7, "continue_from": start, **KINDS[kind]})
    saver = ModelCheckpoint(path, save_last=True)
    the_trainer = trainer(
        path, max_epochs=epochs, callbacks=[twa, saver], enable_checkpointing=True
    )
    module = Notes()
    the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt)
    return twa, module, the_trainer


@pytest.mark.matrix(6)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["average", "raw"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_finished_run_is_trained_on(tmp_path, kind, start, resumed) -> None:
    twa, module, the_trainer = fit(tmp_path, kind, start, 6)
    holds_its_average(twa, module)
    first, average = module, module.now()
    if resumed:
        twa, module, the_trainer = fit(tmp_path, kind, start, 12, tmp_path / "last.ckpt")
    else:
        the_trainer.fit_loop.max_epochs = 12
        the_trainer.fit(module, loader(), loader(32, seed=1))
    holds_its_average(twa, module)
    assert the_trainer.current_epoch == 12
    if start == "average":
        assert equal(module.starts[6], average)
    else:
        # of a uniform run the epoch's end is noted behind the callback's own: only until then
        assert not equal(module.starts[6], average)
        if kind != "uniform":
            assert equal(module.starts[6], first.ends[3])
    snapshots = [name for name in twa.candidate_names if "epoch" in name]
    epochs = range(8, 12) if kind == "uniform" else range(6, 8)
    assert snapshots == [f"epoch={epoch}" for epoch in epochs]
    for epoch in (6, 7):
        assert not equal(module.starts[epoch], module.ends[epoch])
    mean = sum(
        float(beta) * candidate.parameters["net.0.weight"]
        for beta, candidate in zip(twa.averaging_weights[:, 0], twa._run.store, strict=True)
    )
    torch.testing.assert_close(module.net[0].weight.detach(), mean, rtol=1e-4, atol=1e-5)


def test_twice(tmp_path) -> None:
    twa, module, the_trainer = fit(tmp_path, "phase", "raw", 6)
    for epochs in (12, 24):
        the_trainer.fit_loop.max_epochs = epochs
        the_trainer.fit(module, loader(), loader(32, seed=1))
        holds_its_average(twa, module)
    assert equal(module.starts[12], module.ends[7])
    assert twa.candidate_names == [f"epoch={epoch}" for epoch in range(12, 16)]


@pytest.mark.parametrize("resumed", [False, True])
def test_by_default_it_is_refused_with_the_argument_named(tmp_path, resumed) -> None:
    _, module, the_trainer = fit(tmp_path, "phase", None, 6)
    average = module.now()
    the_trainer.fit_loop.max_epochs = 12

    def again() -> None:
        if resumed:
            fit(tmp_path, "phase", None, 12, tmp_path / "last.ckpt")
        else:
            the_trainer.fit(module, loader(), loader(32, seed=1))

    with pytest.raises(RuntimeError, match=re.escape("TWACallback(continue_from='average')")):
        again()
    assert equal(module.now(), average)


@pytest.mark.parametrize("start", ["average", "raw"])
def test_a_phase_that_would_have_no_candidates_is_refused_before_training(tmp_path, start) -> None:
    twa, module, the_trainer = fit(tmp_path, "phase", start, 6)
    steps = the_trainer.global_step
    the_trainer.fit_loop.max_epochs = 8  # start_epoch=0.7 is epoch 5
    with pytest.raises(ValueError, match="TWA needs at least two candidates"):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert the_trainer.global_step == steps
    holds_its_average(twa, module)
    assert twa.averaging_weights is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continue_from": "last"}, "Invalid continue_from='last'. Must be one of"),
        ({"continue_from": "raw", "cycles": 2}, "cycles=2 does not go with continue_from='raw'"),
    ],
)
def test_values_that_mean_nothing(options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TWACallback(**options)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("start", ["average", "raw"])
def test_a_run_that_early_stopping_has_ended(tmp_path, resumed, start) -> None:
    """The end of the phase then was not the Trainer's, and does not limit what follows."""

    def again(ckpt: Any = None) -> tuple[TWACallback, Notes, L.Trainer]:
        L.seed_everything(4, verbose=False)
        twa = TWACallback(10, start_on_early_stopping=True, continue_from=start)
        stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
        saver = ModelCheckpoint(tmp_path, save_last=True)
        the_trainer = trainer(
            tmp_path, max_epochs=30 if ckpt else 14, callbacks=[twa, stop, saver],
            enable_checkpointing=True,
        )  # fmt: skip
        module = Notes()
        the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt)
        return twa, module, the_trainer

    twa, module, the_trainer = again()
    holds_its_average(twa, module)
    before = the_trainer.current_epoch
    assert before < 10
    if resumed:
        twa, module, the_trainer = again(tmp_path / "last.ckpt")
    else:
        the_trainer.fit_loop.max_epochs = 30
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert the_trainer.current_epoch > before
    assert all(int(name.split("=")[1]) >= before for name in twa.candidate_names)
    holds_its_average(twa, module)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("start", ["average", "raw"])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_from_a_checkpoint_of_the_last_validation(tmp_path, start, end, uniform) -> None:
    """What it goes on from is no candidate, and with nothing left to be trained nothing happens."""
    kind = {"solver": SolverConfig(name="uniform")} if uniform else {}

    def again(epochs: int, ckpt: Any = None) -> tuple[TWACallback, Notes]:
        L.seed_everything(4, verbose=False)
        collect = CollectConfig(start=5) if epochs > 6 else CollectConfig(start=1)
        twa = TWACallback(epochs - 2, continue_from=start, collect=collect, **kind)
        saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=end)
        module = Notes()
        trainer(tmp_path, max_epochs=epochs, callbacks=[twa, saver], enable_checkpointing=True).fit(
            module, loader(), loader(32, seed=1), ckpt_path=ckpt
        )
        holds_its_average(twa, module)
        return twa, module

    _, module = again(6)
    twa, same = again(6, tmp_path / "last.ckpt")
    assert equal(module.now(), same.now())
    twa, _ = again(10, tmp_path / "last.ckpt")
    assert next(n for n in twa.candidate_names if n.startswith("epoch=")) == "epoch=6"


def test_raw_weights_that_were_not_kept_are_said(tmp_path) -> None:
    """A run that was finished without the option has no other weights than its average."""
    _, first, _ = fit(tmp_path, "phase", None, 6)
    with pytest.raises(ValueError, match="this run has not kept them: it was finished without"):
        fit(tmp_path, "phase", "raw", 12, tmp_path / "last.ckpt")
    twa, module, _ = fit(tmp_path, "phase", "average", 12, tmp_path / "last.ckpt")
    assert equal(module.starts[6], first.now())
    holds_its_average(twa, module)
