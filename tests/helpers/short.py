"""A short run with a phase at its end, of a module that is made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import lightning_twa
from helpers.common import loader, trainer
from helpers.plain import CollectConfig, TWACallback


def short_run(path: Path, make: type[L.LightningModule], *callbacks: Any, **kwargs: Any) -> Any:
    """Fit with a phase in the last two epochs of six; the callback, the module and the Trainer."""
    L.seed_everything(3, verbose=False)
    module = make()
    options = {"start_epoch": 4, "collect": CollectConfig(start=0), **kwargs.pop("twa", {})}
    twa, before = TWACallback(**options), kwargs.pop("before", False)
    order = [*callbacks, twa] if before else [twa, *callbacks]
    the_trainer = trainer(path, callbacks=order, **kwargs.pop("trainer", {}))
    the_trainer.fit(module, loader(), loader(32, seed=1), **kwargs)
    return twa, module, the_trainer


def holds_its_average(twa: TWACallback, module: nn.Module) -> None:
    assert twa.phase == "done"
    average = twa.average_state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, average[name]), name


def twa_of(the_trainer: L.Trainer) -> TWACallback:
    return next(c for c in the_trainer.callbacks if isinstance(c, lightning_twa.TWACallback))
