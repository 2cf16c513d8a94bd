"""Runs with the callback: as a user fits, and such that must fail."""

from __future__ import annotations

import re
from types import MethodType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.plain import TWACallback


def fit(tmp_path, twa: TWACallback, module: L.LightningModule | None = None, **kwargs: Any):
    """Fit with the callback and a recorder; returns module, recorder, trainer."""
    module = module or Regressor()
    train = kwargs.pop("train") if "train" in kwargs else loader()
    val = kwargs.pop("val", loader(32, seed=1))
    recorder = Recorder(twa)
    callbacks = [twa, *kwargs.pop("callbacks", []), recorder]
    the_trainer = trainer(tmp_path, callbacks=callbacks, **kwargs)
    the_trainer.fit(module, train, val)
    return module, recorder, the_trainer


def is_borrowed(the_trainer: L.Trainer) -> bool:
    """Whether the Trainer steps the phase's optimizer by way of the user's."""
    held = [isinstance(vars(o).get("step"), MethodType) for o in the_trainer.optimizers]
    held.append("update_lr_schedulers" in vars(the_trainer.fit_loop.epoch_loop))
    assert any(held) == all(held)
    return any(held)


def fit_fails(
    tmp_path,
    twa: TWACallback,
    message: str,
    module: L.LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    epochs_trained: int = 0,
    **kwargs: Any,
) -> None:
    """``fit`` raises a ValueError with exactly this message, having trained for no more than
    ``epochs_trained`` epochs; the same Trainer and module then train on without the callback.
    """
    module = module or Regressor()
    train = loader() if train is None else train
    before = weights(module)
    the_trainer = trainer(tmp_path, callbacks=[twa], **kwargs)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, train, val)
    assert the_trainer.current_epoch == epochs_trained
    if epochs_trained == 0:
        assert torch.equal(weights(module), before)
        assert the_trainer.global_step == 0
    assert twa.phase == "collect"
    assert twa.averaging_weights is None
    assert the_trainer.optimizers == [] or not is_borrowed(the_trainer)
    if not isinstance(the_trainer.strategy, SingleDeviceStrategy) or isinstance(module, Broken):
        return  # one that could not train without the callback either, or only on other hardware
    del the_trainer.callbacks[:]
    the_trainer.limit_val_batches = 0
    the_trainer.fit_loop.max_epochs = epochs_trained + 1
    the_trainer.fit(module, loader())
    assert the_trainer.current_epoch == epochs_trained + 1
    assert not torch.equal(weights(module), before)


class Broken(Regressor):
    """Whatever is wrong with it is wrong without the callback too."""


def plain_weights(tmp_path, train: Any = None, **kwargs: Any) -> torch.Tensor:
    """The weights that the same run ends with when there is no callback of ours."""
    L.seed_everything(1, verbose=False)
    module = Regressor()
    trainer(tmp_path, **kwargs).fit(
        module, loader() if train is None else train, loader(32, seed=1)
    )
    return weights(module)


DATA = pytest.mark.parametrize(
    "data",
    [
        "train",
        pytest.param("val", marks=pytest.mark.filterwarnings("ignore:TWACallback.data='val'")),
    ],
)
