"""scvi-tools: a variational autoencoder of counts of genes, in its own Trainer."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import lightning as L
import numpy as np
import scvi
from anndata import AnnData
from comparing import compare

from lightning_twa import TWACallback


def cells(n: int = 200, genes: int = 40) -> AnnData:
    """Counts of two kinds of cells."""
    random = np.random.default_rng(0)
    rates = random.gamma(2.0, 1.0, (2, genes))[random.integers(0, 2, n)]
    return AnnData(random.poisson(rates).astype(np.float32))


def fit(twa: TWACallback) -> L.LightningModule:
    table = cells()
    scvi.model.SCVI.setup_anndata(table)
    model = scvi.model.SCVI(table, n_hidden=32, n_latent=4)
    with TemporaryDirectory() as folder:
        model.train(
            max_epochs=20,
            accelerator="cpu",
            batch_size=32,
            train_size=0.8,
            check_val_every_n_epoch=1,
            callbacks=[twa],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
    return model.trainer.lightning_module


if __name__ == "__main__":
    compare("scvi-tools", TWACallback, fit)
