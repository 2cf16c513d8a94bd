"""darts: N-BEATS on a short series, in a Trainer of the package ``pytorch_lightning``."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
from comparing import compare
from darts import TimeSeries
from darts.models import NBEATSModel

from lightning_twa.pytorch_lightning import TWACallback


def fit(twa: TWACallback) -> pl.LightningModule:
    time = np.arange(240)
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(time))
    series = TimeSeries.from_values((np.sin(time / 5) + noise).astype(np.float32))
    with TemporaryDirectory() as folder:
        model = NBEATSModel(
            input_chunk_length=16,
            output_chunk_length=4,
            num_stacks=2,
            num_blocks=1,
            layer_widths=16,
            batch_size=32,
            n_epochs=15,
            random_state=0,
            work_dir=folder,
            pl_trainer_kwargs={
                "accelerator": "cpu",
                "callbacks": [twa],
                "default_root_dir": folder,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )
        model.fit(series[:200], val_series=series[180:], verbose=False)
    return model.model


if __name__ == "__main__":
    compare("u8darts", TWACallback, fit)
