"""Runs that choose by held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from helpers.common import Regressor, loader, trainer
from lightning_twa import CollectConfig, TWACallback

POWER = (0.05, 0.13)
AVERAGES = ["power(0.05)", "power(0.13)", "mean"]


def make(**kwargs: Any) -> TWACallback:
    collect = CollectConfig(start=1, power_averages=POWER)
    return TWACallback(**{"start_epoch": 4, "heldout": "auto", "collect": collect, **kwargs})


def fitted(
    path: Path, twa: TWACallback, module: L.LightningModule | None = None, **kwargs: Any
) -> L.LightningModule:
    module = module or Regressor()
    held_out = kwargs.pop("held_out", loader(32, seed=1))
    trainer(path, callbacks=[twa], **kwargs).fit(module, loader(), held_out)
    return module


def mixed(twa: TWACallback, beta: Tensor | None = None) -> Tensor:
    """The average with the callback's averaging weights, in float64."""
    beta = twa.averaging_weights if beta is None else beta
    return sum(
        float(b) * torch.cat([t.double().reshape(-1) for t in c.parameters.values()])
        for b, c in zip(beta[:, 0], twa.candidates, strict=True)
    )
