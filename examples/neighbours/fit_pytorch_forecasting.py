"""pytorch-forecasting: N-HiTS on short series."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import lightning as L
import numpy as np
import pandas as pd
from comparing import compare
from pytorch_forecasting import NHiTS, TimeSeriesDataSet

from lightning_twa import TWACallback

LENGTH, ENCODER, DECODER = 60, 16, 4


def series(count: int = 4) -> pd.DataFrame:
    """Sines with noise."""
    random, time = np.random.default_rng(0), np.arange(LENGTH)
    parts = [
        pd.DataFrame(
            {
                "time": time,
                "group": str(i),
                "value": np.sin(time / (3 + i)) + 0.1 * random.standard_normal(LENGTH),
            }
        )
        for i in range(count)
    ]
    return pd.concat(parts, ignore_index=True)


def fit(twa: TWACallback) -> L.LightningModule:
    frame = series()
    training = TimeSeriesDataSet(
        frame[frame.time < LENGTH - 2 * DECODER],
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=ENCODER,
        max_prediction_length=DECODER,
        time_varying_unknown_reals=["value"],
    )
    validation = TimeSeriesDataSet.from_dataset(
        training, frame, min_prediction_idx=LENGTH - 2 * DECODER
    )
    train = training.to_dataloader(train=True, batch_size=16, num_workers=0)
    val = validation.to_dataloader(train=False, batch_size=16, num_workers=0)
    network = NHiTS.from_dataset(training, learning_rate=1e-3, hidden_size=16)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=12,
            gradient_clip_val=0.1,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[twa],
        )
        trainer.fit(network, train, val)
    return network


if __name__ == "__main__":
    compare("pytorch-forecasting", TWACallback, fit)
