"""finetuning-scheduler unfreezes a model level by level; the phase comes behind its last level."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import finetuning_scheduler as fts
import lightning as L
import torch
from comparing import compare
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_twa import TWACallback


class Regressor(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


def data(n: int, seed: int) -> DataLoader[Any]:
    """A noisy nonlinear regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(n, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16)


def fit(twa: TWACallback) -> L.LightningModule:
    module = Regressor()
    with TemporaryDirectory() as folder:
        schedule = Path(folder) / "schedule.yaml"
        schedule.write_text(
            "0: {params: [net.3.weight, net.3.bias], max_transition_epoch: 3}\n"
            "1: {params: ['net.1.*'], max_transition_epoch: 6}\n"
            "2: {params: ['net.0.*']}\n"
        )
        own = [
            fts.FinetuningScheduler(ft_schedule=str(schedule), restore_best=False),
            fts.FTSCheckpoint(folder, monitor="val_loss", save_top_k=1),
            fts.FTSEarlyStopping(monitor="val_loss", patience=100),
        ]
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=40,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*own, twa],
        )
        trainer.fit(module, data(128, 0), data(64, 1))
    return module


if __name__ == "__main__":
    compare("finetuning-scheduler", TWACallback, fit)
