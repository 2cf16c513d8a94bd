"""Runs whose candidates are files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import state
from lightning_twa import StorageConfig


def twa(folder: Path | None = None, **kwargs: Any) -> TWACallback:
    options = {"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs}
    if folder is not None:
        options["storage"] = StorageConfig(kind="disk", dirpath=str(folder))
    return TWACallback(**options)


def run(
    folder: Path, the_twa: TWACallback, module: Regressor, *callbacks: Any, **kwargs: Any
) -> dict[str, Any]:
    """Fit in one process; the end of it."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    L.seed_everything(1, verbose=False)
    the_trainer = trainer(folder, callbacks=[the_twa, *callbacks], **kwargs)
    the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt_path)
    return {"state": state(module), "averaging_weights": the_twa.averaging_weights}


def saver(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    options = {"save_top_k": -1, "save_on_train_epoch_end": True, **kwargs}
    return ModelCheckpoint(folder, "{epoch}", **options)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
