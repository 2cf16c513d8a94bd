"""Runs beside other callbacks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback


def twa(**kwargs: Any) -> TWACallback:
    return TWACallback(4, collect=CollectConfig(start=0), **kwargs)


def plain(tmp_path: Any, **kwargs: Any) -> tuple[Tensor, TWACallback]:
    """The final weights of a run with this callback alone."""
    torch.manual_seed(0)
    module, callback = Regressor(batchnorm=True), twa()
    options = {k: v for k, v in kwargs.items() if k != "callbacks"}
    trainer(tmp_path, callbacks=[callback], **options).fit(module, loader(), loader(32, seed=1))
    return weights(module), callback


def beside(
    tmp_path: Any, others: list[L.Callback], *, first: bool, **kwargs: Any
) -> tuple[Regressor, TWACallback, L.Trainer]:
    torch.manual_seed(0)
    module, callback = Regressor(batchnorm=True), twa()
    callbacks = [callback, *others] if first else [*others, callback]
    the_trainer = trainer(tmp_path, callbacks=callbacks, **kwargs)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    return module, callback, the_trainer
