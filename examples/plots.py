"""Draws the averaging weights and the subspace of a TWA run on the digits; about 20 seconds.

python examples/plots.py figures
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import lightning as L
import torch
from digits import Classifier, Digits
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from lightning_twa import TWACallback, plot_averaging_weights, plot_subspace


def main() -> None:
    """Train, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the figures go")
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--start-epoch", type=int, default=30)
    parser.add_argument("--points", type=int, default=21, help="of the grid, on each axis")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    L.seed_everything(0, verbose=False)
    data, twa = Digits(0), TWACallback(args.start_epoch)
    steps = args.start_epoch * 8  # of ordinary training, the learning rate falls after them
    module = Classifier(lambda step: 1.0 if step < steps else 0.1)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[twa],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)

    images, labels = data.test.tensors
    batches = data.train.tensors[0].split(50)

    def loss() -> float:
        update_bn(batches, module.net)
        module.eval()
        with torch.no_grad():
            return F.cross_entropy(module.net(images), labels).item()

    args.folder.mkdir(parents=True, exist_ok=True)
    weights = plot_averaging_weights(twa)
    subspace = plot_subspace(twa, module, loss, points=args.points)
    for name, figure in (("averaging-weights", weights), ("subspace", subspace)):
        figure.savefig(args.folder / f"{name}.png", dpi=100)
        print(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
