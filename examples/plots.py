"""Draws the figures of a TWA run on the digits, light and dark; about a minute.

    python examples/plots.py figures

Those of the documentation: python examples/plots.py docs/_static
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import lightning as L
import matplotlib.style
import torch
from digits import Classifier, Digits
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from lightning_twa import (
    TWACallback,
    plot_averaging_weights,
    plot_held_out,
    plot_loss_path,
    plot_path,
    plot_subspace,
)

DARK = "#131416"  # behind the text of the documentation, where that is dark
STYLES = {
    "": {},
    "-dark": {
        **matplotlib.style.library["dark_background"],
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), DARK),
    },
}


def main() -> None:
    """Train, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the figures go")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--start-epoch", type=int, default=30)
    parser.add_argument("--points", type=int, default=21, help="of the grid, on each axis")
    parser.add_argument("--dpi", type=int, default=150, help="pixels per inch; 6.4 inches wide")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(1)  # with more, sums have other last digits, and runs go other ways
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
    figures = {
        "averaging-weights": lambda: plot_averaging_weights(twa),
        "heldout": lambda: plot_held_out(twa),
        "loss-path": lambda: plot_loss_path(twa),
        "path": lambda: plot_path(twa),
        "subspace": lambda: plot_subspace(twa, module, loss, points=args.points),
    }
    for suffix, style in STYLES.items():
        for name, draw in figures.items():
            with matplotlib.rc_context(style):
                file = args.folder / f"{name}{suffix}.png"
                draw().savefig(file, dpi=args.dpi)
            print(file)
    print(twa.result)


if __name__ == "__main__":
    main()
