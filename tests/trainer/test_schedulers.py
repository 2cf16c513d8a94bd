"""The user's schedulers stand still in the phase; what is logged says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from helpers.common import Regressor
from helpers.plain import TWACallback
from helpers.runs import fit


def test_logged_values_and_learning_rate_monitor(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    _, _, the_trainer = fit(tmp_path, twa, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    import csv

    with open(f"{logger.log_dir}/metrics.csv") as file:
        table = list(csv.DictReader(file))
    lrs = [float(r["twa/lr"]) for r in table if r["twa/lr"]]
    norms = [float(r["twa/coefficient_norm"]) for r in table if r["twa/coefficient_norm"]]
    counts = [float(r["twa/num_candidates"]) for r in table if r["twa/num_candidates"]]
    monitored = [float(r["lr-SGD"]) for r in table if r["lr-SGD"]]
    assert len(lrs) == len(norms) == 8
    assert sum(lrs) == pytest.approx(2.0, rel=1e-6), "the radius is the sum of the learning rates"
    assert norms[-1] <= 2.0
    assert norms[-1] > 0
    assert counts == [0, 0, 1, 2, 2, 2]
    rates = [0.05 * 0.7 ** (min(epoch, 4) // 2) for epoch in range(6)]
    assert monitored == pytest.approx([rate for rate in rates for _ in range(4)])
    assert the_trainer.callback_metrics["twa/num_candidates"] == 2


def test_schedulers_are_visible_but_do_not_step_in_the_phase(tmp_path) -> None:
    seen: list[tuple[int, float]] = []

    class Looks(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((self.trainer.current_epoch, self.lr_schedulers().get_last_lr()[0]))
            return super().training_step(batch, batch_idx)

    fit(tmp_path, TWACallback(start_epoch=4), Looks())
    by_epoch = dict(seen)
    assert by_epoch[2] == pytest.approx(0.05 * 0.7)
    assert by_epoch[4] == by_epoch[5] == pytest.approx(0.05 * 0.7**2)


def test_plateau_scheduler_without_its_metric_in_the_phase(tmp_path) -> None:
    class Plateau(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.log("watched", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "watched"},
            }

    twa = TWACallback(start_epoch=4)
    fit(tmp_path, twa, Plateau())
    assert twa.phase == "done"
