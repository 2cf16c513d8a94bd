"""What loggers get of a run: metrics under stable names, and the figure; the real packages."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_twa
from helpers.common import Regressor, loader, trainer

METRICS = {
    "twa/num_candidates",
    "twa/lr",
    "twa/coefficient_norm",
    "twa/heldout/mean",
    "twa/heldout/last_weights",
    "twa/heldout/power_0.13",
}
FIGURE = "twa/averaging_weights"


def fit(tmp_path: Path, *loggers: Any, **kwargs: Any) -> lightning_twa.TWACallback:
    torch.manual_seed(0)
    twa = lightning_twa.TWACallback(4, collect=lightning_twa.CollectConfig(start=1))
    trainer(tmp_path, callbacks=[twa], logger=list(loggers), log_every_n_steps=1, **kwargs).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    assert twa.phase == "done"
    return twa


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, .tensorboardX.")
def test_tensorboard_and_csv(tmp_path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="board")
    twa = fit(tmp_path, table, board)
    with open(Path(table.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= METRICS
    means = [float(row["twa/heldout/mean"]) for row in rows if row["twa/heldout/mean"]]
    assert means == [pytest.approx(twa.result.losses["mean"], rel=1e-5)] * len(means) != []
    events = accumulators.EventAccumulator(board.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert events.Tags()["images"] == [FIGURE]


def test_weights_and_biases_offline(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="twa")
    fit(tmp_path, logger)
    summary = dict(logger.experiment.summary)
    assert set(summary) >= METRICS
    assert FIGURE in summary
    folder = Path(logger.experiment.dir)
    logger.experiment.finish()
    (picture,) = folder.glob(f"media/images/{FIGURE}_*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("ignore")  # of the file store, which its makers want to be rid of
def test_mlflow_in_local_files(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("twa", tracking_uri=f"file:{tmp_path / 'runs'}")
    fit(tmp_path, logger)
    assert set(logger.experiment.get_run(logger.run_id).data.metrics) >= METRICS
    (picture,) = (tmp_path / "runs").rglob(f"{FIGURE}.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
