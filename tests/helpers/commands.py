"""``python -m lightning_twa`` within the test process, and checkpoints for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from lightning_twa.__main__ import main


def checkpoints(tmp_path: Path, **kwargs: Any) -> TWACallback:
    """``epoch=0.ckpt`` to ``epoch=5.ckpt``: the phase begins after epoch 3."""
    twa = TWACallback(4, collect=CollectConfig(start=1), **kwargs)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(0)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    return twa


def printed(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def usage(capsys: pytest.CaptureFixture, message: str, *arguments: Any) -> None:
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
