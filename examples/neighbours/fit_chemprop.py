"""chemprop: a message-passing network for properties of molecules."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import lightning as L
import torch
from chemprop import data, models, nn
from comparing import compare

from lightning_twa import TWACallback

RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccncc1")


def molecules(n: int, seed: int) -> data.MoleculeDataset:
    """Chains on rings, and a number that their lengths make."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for i in range(n):
        length = int(torch.randint(1, 8, (1,), generator=generator))
        noise = 0.1 * float(torch.randn(1, generator=generator))
        smiles = "C" * length + "O" * (i % 2) + RINGS[i % len(RINGS)]
        points.append(data.MoleculeDatapoint.from_smi(smiles, [length / 4 - 1 + noise]))
    return data.MoleculeDataset(points)


def fit(twa: TWACallback) -> L.LightningModule:
    train = data.build_dataloader(molecules(64, 0), batch_size=16, seed=0)
    val = data.build_dataloader(molecules(32, 1), batch_size=16, shuffle=False)
    network = models.MPNN(
        nn.BondMessagePassing(d_h=32, depth=2),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=32, hidden_dim=32),
        batch_norm=True,
    )
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=20,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[twa],
        )
        trainer.fit(network, train, val)
    return network


if __name__ == "__main__":
    compare("chemprop", TWACallback, fit)
