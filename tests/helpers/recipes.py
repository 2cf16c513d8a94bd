"""Short runs with the kinds of averages, for what users do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from helpers.common import loader, trainer
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SolverConfig

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "validated": {"validate_average": True},
    "uniform, validated": {"solver": SolverConfig(name="uniform"), "validate_average": True},
}


def twa(kind: str = "default", **kwargs: Any) -> TWACallback:
    """Candidates from epoch 0 on, the phase from epoch 3 on."""
    start = {"start_epoch": 3, "collect": CollectConfig(start=0)}
    return TWACallback(**{**start, **KINDS[kind], **kwargs})


def run(
    path: Path, callback: TWACallback | None, module: L.LightningModule, *others: Any, **kwargs: Any
) -> L.Trainer:
    """Five epochs with checkpointing, unless told otherwise."""
    torch.manual_seed(1)
    the_trainer = trainer(
        path,
        callbacks=[*([] if callback is None else [callback]), *others],
        **{"max_epochs": 5, "enable_checkpointing": True, **kwargs},
    )
    the_trainer.fit(module, loader(), loader(32, seed=1))
    return the_trainer
