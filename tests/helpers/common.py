"""Small models, data and Trainers that several tests use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def regression_data(n: int = 64, seed: int = 0) -> TensorDataset:
    """A noisy nonlinear regression with 6 inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(n, 1, generator=generator)
    return TensorDataset(x, y)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; torch's own has no bfloat16 in old CPU builds."""
    return (output - target).square().mean()


class Regressor(L.LightningModule):
    """An MLP, with BatchNorm if asked, that trains with SGD and a scheduler."""

    def __init__(self, batchnorm: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(8)] if batchnorm else []
        self.net = nn.Sequential(nn.Linear(6, 8), *norm, nn.Tanh(), nn.Linear(8, 1))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = mse(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", mse(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)]


class Frozen(Regressor):
    """Its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net[0].requires_grad_(False)


def loader(n: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader:
    """Batches in a fixed order."""
    return DataLoader(regression_data(n, seed), batch_size=batch_size)


def trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU; any argument can be given."""
    defaults: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **kwargs})


def weights(module: nn.Module) -> Tensor:
    """All parameters in one flat float64 vector, copied."""
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


def flat(tensors: Any) -> Tensor:
    """The values of a dict of tensors in one flat float64 vector."""
    return torch.cat([t.double().reshape(-1) for t in tensors.values()])


def uniform(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of states, in float64."""
    return {n: sum(s[n].double() for s in states) / len(states) for n in states[0]}


def load_script(path: Path) -> ModuleType:
    """An example as a module, found under the name ``<stem>_example`` while it is loaded and used:
    there its dataclasses look their annotations up.
    """
    name = f"{path.stem}_example"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # as when it is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


class Recorder(L.Callback):
    """Weights and phase after every optimizer step, and weights at the end of every epoch."""

    def __init__(self, twa: Any) -> None:
        self.twa = twa
        self.steps: list[tuple[str, Tensor]] = []
        self.epochs: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append((self.twa.phase, weights(pl_module)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs[trainer.current_epoch] = weights(pl_module)
