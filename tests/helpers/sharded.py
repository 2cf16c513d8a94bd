"""Runs with FSDP2 and tensor parallelism through ``ModelParallelStrategy``, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from helpers.common import Regressor, flat, loader, trainer
from helpers.ddp import strided
from helpers.plain import CollectConfig, TWACallback
from helpers.processes import run
from lightning_twa import StorageConfig

NEEDS_FSDP2 = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch's FSDP2 on the CPU needs torch 2.6"
)
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    NEEDS_FSDP2,
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # Lightning's calls into torch
    pytest.mark.filterwarnings("ignore:.*torch.distributed.checkpoint.*"),
]


class Sharded(Regressor):
    """Two layers, the second with fewer rows than processes; fully sharded."""

    def __init__(self, batchnorm: bool = False) -> None:
        super().__init__(batchnorm)
        self.net = nn.Sequential(
            nn.Linear(6, 15), *([nn.BatchNorm1d(15)] if batchnorm else []), nn.Tanh(),
            nn.Linear(15, 1),
        )  # fmt: skip

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed._composable.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Split(Sharded):
    """The first layer split by columns and the second by rows: tensor parallelism."""

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        self.net[0] = nn.Linear(6, 16)
        self.net[2] = nn.Linear(16, 1)
        parallelize_module(
            self.net,
            self.device_mesh["tensor_parallel"],
            {"0": ColwiseParallel(), "2": RowwiseParallel()},
        )


class Normed(Sharded):
    """Behind a normalisation in sequence parallelism: each process has gradients of its part of the
    batch for weights that all of them have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Identity(), nn.LayerNorm(6), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)
        )

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        parallelize_module(
            self.net,
            self.device_mesh["tensor_parallel"],
            {
                "0": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0)),
                "1": SequenceParallel(sequence_dim=0),
                "2": ColwiseParallel(input_layouts=Shard(0)),
                "4": RowwiseParallel(output_layouts=Replicate()),
            },
        )


class Unsplit(Split):
    """The same weights in one process."""

    def configure_model(self) -> None:
        self.net[0] = nn.Linear(6, 16)
        self.net[2] = nn.Linear(16, 1)


def whole(module: nn.Module, buffers: bool = True) -> dict[str, Tensor]:
    """The state dict, or its parameters, assembled on every process."""
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in module.state_dict().items()
        if buffers or name in dict(module.named_parameters())
    }


class Report(L.Callback):
    """The assembled weights after every step, and the end."""

    def __init__(self, twa: TWACallback, folder: Path) -> None:
        self.twa, self.folder = twa, folder
        self.steps: list[tuple[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append((self.twa.phase, flat(whole(pl_module, buffers=False))))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        report = {
            "phase": self.twa.phase,
            "state": whole(pl_module),
            "averaging_weights": self.twa.averaging_weights,
            "steps": self.steps,
        }
        self.folder.mkdir(exist_ok=True, parents=True)
        torch.save(report, self.folder / f"rank{trainer.global_rank}.pt")


def twa(folder: Path, **kwargs: Any) -> TWACallback:
    defaults = {"start_epoch": 3, "collect": CollectConfig(start=0)}
    storage = StorageConfig(dirpath=str(folder.parent / "candidates"))
    return TWACallback(**{**defaults, "storage": storage, **kwargs})


def fit(
    folder: Path,
    module: L.LightningModule,
    processes: int,
    twa_options: dict[str, Any],
    ckpt_path: Path | None = None,
    save_to: Path | None = None,
    strategy_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Fit in so many processes with global batches of 12; one report a rank."""
    options = {"data_parallel_size": processes, "tensor_parallel_size": 1}
    options.update(strategy_options or {})
    data_parallel = options["data_parallel_size"]

    def work() -> None:
        L.seed_everything(1, verbose=False)
        the_twa = twa(folder, **twa_options)
        callbacks = [the_twa, Report(the_twa, folder)]
        if save_to is not None:
            callbacks.append(
                ModelCheckpoint(save_to, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            )
        several: dict[str, Any] = {}
        if processes > 1:
            several = {"strategy": ModelParallelStrategy(**options), "devices": processes}
        the_trainer = trainer(
            folder, callbacks=callbacks, use_distributed_sampler=False,
            enable_checkpointing=save_to is not None, **several, **{"max_epochs": 5, **kwargs}
        )  # fmt: skip
        the_trainer.fit(
            module,
            strided(processes, 60, batch=12) if data_parallel > 1 else loader(60, 12),
            strided(processes, 30, seed=1, batch=6) if data_parallel > 1 else loader(30, 6, seed=1),
            ckpt_path=ckpt_path,
        )

    if processes == 1:
        work()
    else:
        run(work, processes)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
