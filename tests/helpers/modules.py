"""Modules that fail, or that disturb what is re-estimated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric

from helpers.common import Regressor


class Fails(Regressor):
    """Raises in the phase, in training or in validation."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        super().__init__(batchnorm=True)
        self.where, self.error = where, error

    def _maybe(self, where: str) -> None:
        if self.where == where and not self.trainer.sanity_checking:
            epoch = 5 if self.trainer.max_epochs == 6 else 2
            if self.trainer.current_epoch == epoch:
                raise self.error("planned")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._maybe("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._maybe("validation")
        super().validation_step(batch, batch_idx)


class Augmented(Regressor):
    """Dropout, a metric and logging in ``training_step``: what re-estimation must not disturb."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net.append(nn.Dropout(0.0))
        self.mean_loss = MeanMetric()
        self.frozen_norm = nn.BatchNorm1d(6)

    def on_train_epoch_start(self) -> None:
        self.frozen_norm.eval()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step((self.frozen_norm(batch[0]), batch[1]), batch_idx)
        self.mean_loss(loss)
        self.log("mean_loss", self.mean_loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_stats = self.net[1].running_mean.clone(), self.net[1].running_var.clone()
        super().validation_step((self.frozen_norm(batch[0]), batch[1]), batch_idx)
