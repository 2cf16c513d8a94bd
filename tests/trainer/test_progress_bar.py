"""Progress bars show where the run is."""

from __future__ import annotations

import io
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from helpers.beside import beside, plain, twa
from helpers.common import Regressor, loader, trainer, weights


@pytest.mark.parametrize("first", [True, False])
def test_rich_progress_bar(tmp_path, first) -> None:
    pytest.importorskip("rich")
    expected, _ = plain(tmp_path)
    bar = RichProgressBar(console_kwargs={"file": io.StringIO()})
    module, _, _ = beside(tmp_path, [bar], first=first, enable_progress_bar=True)
    assert torch.equal(weights(module), expected)


def test_progress_bars_show_where_the_run_is(tmp_path) -> None:
    shown: dict[int, set[str]] = {}

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            metrics = self.get_metrics(trainer, trainer.lightning_module)
            shown.setdefault(trainer.current_epoch, set()).update(metrics)

    beside(tmp_path, [Bar()], first=True, enable_progress_bar=True)
    assert not shown[0] & {"twa/lr", "twa/num_candidates"}
    assert "twa/num_candidates" in shown[1]
    assert not shown[3] & {"twa/lr"}
    assert {"twa/lr", "twa/coefficient_norm"} <= shown[4]


@pytest.mark.parametrize("bar", [True, False])
def test_what_takes_long_between_batches_has_a_bar(tmp_path, monkeypatch, capsys, bar) -> None:
    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    _, callback, _ = beside(tmp_path, [], first=True, enable_progress_bar=bar)
    shown = capsys.readouterr().err
    for what in ("TWA: building the subspace", "TWA: re-estimating BatchNorm statistics"):
        assert (what in shown) == bar
    if bar:
        numel = sum(p.numel() for p in callback.candidates[0].parameters.values())
        assert numel == 81
        assert "/243" in shown  # columns in three passes
        assert "/4.00 " in shown  # batches


def test_a_phase_that_goes_on_is_built_in_two_passes(tmp_path, monkeypatch, capsys) -> None:
    """Its directions are known: no Gram matrix is needed."""

    class Boom(L.Callback):
        armed = True

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if self.armed and trainer.current_epoch == 4:
                self.armed = False
                raise KeyError

    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    module, callbacks = Regressor(batchnorm=True), [twa(), Boom()]
    the_trainer = trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True)
    with pytest.raises(KeyError):
        the_trainer.fit(module, loader())
    assert "/243" in capsys.readouterr().err
    the_trainer.fit(module, loader())
    assert "/162" in capsys.readouterr().err
