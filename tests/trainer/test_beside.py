"""Beside other callbacks, Trainer options and kinds of modules: nothing of TWA changes, and nothing
of them, or they are refused.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from helpers.beside import beside, plain, twa
from helpers.common import Recorder, Regressor, loader, mse, trainer, weights
from helpers.plain import TWACallback


def is_the_average(module: nn.Module, callback: TWACallback, atol: float = 1e-6) -> None:
    """The model holds the learned average of the candidates, and it is not the uniform one."""
    assert callback.phase == "done"
    beta, candidates = callback.averaging_weights, callback.candidates
    for name, parameter in module.named_parameters():
        block = 0 if beta.shape[1] == 1 else callback.block_names.index(name)
        mixed = sum(
            float(b) * c.parameters[name].double()
            for b, c in zip(beta[:, block], candidates, strict=True)
        )
        torch.testing.assert_close(parameter.double(), mixed, rtol=1e-4, atol=atol)
    assert not torch.allclose(beta, torch.full_like(beta, 1 / len(candidates)), atol=1e-3)


# --- callbacks


@pytest.mark.matrix(5)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: DeviceStatsMonitor(cpu_stats=False), {"logger": True}),
        (lambda: ModelSummary(), {"enable_model_summary": True}),
        (lambda: TQDMProgressBar(), {"enable_progress_bar": True}),
        (lambda: Timer(duration={"hours": 1}), {}),
        (lambda: LambdaCallback(on_train_epoch_end=lambda *args: None), {}),
    ],
    ids=["stats", "summary", "tqdm", "timer", "lambda"],
)
def test_callbacks_that_watch_change_nothing(tmp_path, make, options, first) -> None:
    options = {**options, "logger": CSVLogger(tmp_path) if options.get("logger") else False}
    expected, alone = plain(tmp_path)
    module, callback, _ = beside(tmp_path, [make()], first=first, **options)
    assert torch.equal(weights(module), expected)
    assert torch.equal(callback.averaging_weights, alone.averaging_weights)


@pytest.mark.parametrize("first", [True, False])
def test_accumulation_that_changes_on_the_way(tmp_path, first) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 2: 2})
    module, callback, the_trainer = beside(tmp_path, [scheduler], first=first)
    assert the_trainer.global_step == 2 * 4 + 4 * 2
    is_the_average(module, callback)


def test_checkpoints_before_and_after_it_in_the_list(tmp_path) -> None:
    for first in (True, False):
        saver = ModelCheckpoint(tmp_path / str(first), save_last=True, save_top_k=-1)
        module, _, _ = beside(tmp_path, [saver], first=first, enable_checkpointing=True)
        saved = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_pruning_is_refused(tmp_path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(ValueError, match=r"^TWACallback and ModelPruning cannot be used in one"):
        trainer(tmp_path, callbacks=[twa(), pruning]).fit(Regressor(), loader())


def test_two_of_them_are_refused(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type"):
        trainer(tmp_path, callbacks=[twa(), twa()])


# --- options of the Trainer


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"inference_mode": False},
        {"use_distributed_sampler": False},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_nothing(tmp_path, options) -> None:
    expected, _ = plain(tmp_path)
    try:
        found, callback = plain(tmp_path, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)
    assert callback.phase == "done"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 2}, 12),
        ({"limit_train_batches": 0.5}, 12),
        ({"overfit_batches": 1}, 6),
        ({"barebones": True}, 24),
        ({"check_val_every_n_epoch": 2}, 24),
        ({"val_check_interval": 0.5}, 24),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.filterwarnings("ignore:.*You have overridden .*which will be skipped")
@pytest.mark.filterwarnings("ignore:.*barebones")
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_options_that_change_what_is_trained(tmp_path, options, steps) -> None:
    module, callback = Regressor(batchnorm=True), twa()
    if "barebones" in options:
        the_trainer = L.Trainer(
            accelerator="cpu", max_epochs=6, callbacks=[callback], barebones=True
        )
    else:
        the_trainer = trainer(tmp_path, callbacks=[callback], **options)
    recorder = Recorder(callback)
    the_trainer.callbacks.append(recorder)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert the_trainer.global_step == steps
    phases = [phase for phase, _ in recorder.steps]
    assert phases.count("collect") == steps * 4 // 6
    is_the_average(module, callback)


class Spectral(Regressor):
    """With a parametrization, whose buffers change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = parametrizations.spectral_norm(nn.Linear(6, 8))
        self.net[-1] = parametrizations.weight_norm(nn.Linear(8, 1))


class Checkpointed(Regressor):
    """Recomputes activations in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.net[:2], batch[0], use_reentrant=False)
        return mse(self.net[2](hidden), batch[1])


class TwoLoaders(Regressor):
    """Trains on two dataloaders at a time."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse(self.net(batch["a"][0]), batch["a"][1]) + mse(
            self.net(batch["b"][0]), batch["b"][1]
        )

    def train_dataloader(self) -> dict[str, DataLoader]:
        return {"a": loader(), "b": loader(seed=5)}


class Skips(Regressor):
    """Ends every epoch after its second batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


# --- modules


@pytest.mark.parametrize("kind", [Spectral, Checkpointed, TwoLoaders, Skips])
def test_kinds_of_modules(tmp_path, kind) -> None:
    torch.manual_seed(0)
    module, callback = kind(), twa()
    the_trainer = trainer(tmp_path, callbacks=[callback])
    data = [] if kind is TwoLoaders else [loader()]
    the_trainer.fit(module, *data)
    assert the_trainer.global_step == (12 if kind is Skips else 24)
    assert callback.candidate_names == [f"epoch={i}" for i in range(4)]
    is_the_average(module, callback, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_module_that_skips_batches_trains_on(tmp_path) -> None:
    class SkipsOdd(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, callback = SkipsOdd(), twa()
    trainer(tmp_path, callbacks=[callback]).fit(module, loader())
    is_the_average(module, callback)
