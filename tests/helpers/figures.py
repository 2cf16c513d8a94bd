"""Runs that have something to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.selection import make
from lightning_twa import SolverConfig, SubspaceConfig


def trained(
    tmp_path: Path,
    blocks: Any = "global",
    subspace: SubspaceConfig | None = None,
    module: Regressor | None = None,
    solver: SolverConfig | None = None,
) -> tuple[TWACallback, Regressor]:
    torch.manual_seed(0)
    module = Regressor(batchnorm=True) if module is None else module
    subspace = SubspaceConfig(blocks=blocks) if subspace is None else subspace
    twa = TWACallback(6, collect=CollectConfig(start=0), subspace=subspace, solver=solver)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], max_epochs=9, enable_checkpointing=True).fit(
        module, loader(), loader(32, seed=1)
    )
    return twa, module


def compared(tmp_path: Path, **kwargs: Any) -> TWACallback:
    """After a run that compared averages on held-out data; ``epoch=5.ckpt`` is its last file, and
    ``epoch=4.ckpt`` one of the phase.
    """
    torch.manual_seed(0)
    twa = make(**kwargs)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    assert twa.result.heldout is not None
    return twa
