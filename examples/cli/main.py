r"""Digits with LightningCLI: TWA is chosen on the command line or in a file, not in the code.

python examples/cli/main.py fit --config examples/cli/twa.yaml
python examples/cli/main.py fit --trainer.max_epochs=12 \
        --trainer.callbacks+=TWACallback --trainer.callbacks.start_epoch=10
python examples/cli/main.py fit --trainer.callbacks.help=TWACallback
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_twa  # noqa: F401  now the CLI knows TWACallback by its short name


class Digits(L.LightningDataModule):
    """The 8x8 digits of scikit-learn.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        bunch = load_digits()
        images = torch.tensor(bunch.data, dtype=torch.float32) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        sets = TensorDataset(images[order], torch.tensor(bunch.target)[order])
        self.train, self.val = torch.utils.data.random_split(
            sets, [1000, 797], generator=torch.Generator().manual_seed(0)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)


class Classifier(L.LightningModule):
    """A small MLP with BatchNorm.

    Args:
        width: Of the hidden layer.
        lr: Learning rate of SGD.
    """

    def __init__(self, width: int = 64, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(args: Any = None) -> LightningCLI:
    """Run the command line, or ``args`` instead of it."""
    return LightningCLI(Classifier, Digits, seed_everything_default=0, args=args)


if __name__ == "__main__":
    main()
