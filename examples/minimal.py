"""The one-line diff: ``callbacks=[TWACallback()]`` in an ordinary Lightning script."""

from __future__ import annotations

import lightning as L
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_twa import TWACallback


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


torch.set_num_threads(1)  # a model of this size gains nothing from more
L.seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
train, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [1000, 797])

twa = TWACallback()  # the last 13 of 400 steps learn how to average what was kept before them
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = L.Trainer(max_epochs=20, callbacks=[twa], **quiet)
model = Classifier()
trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
accuracy = trainer.test(model, DataLoader(test, batch_size=50), verbose=False)[0]["test/accuracy"]

assert twa.averaging_weights is not None
print(f"test accuracy of the average: {100 * accuracy:.2f} %, made of")
for name, weight in zip(twa.candidate_names, twa.averaging_weights[:, 0].tolist(), strict=True):
    print(f"{weight:+.3f} of {name}")
