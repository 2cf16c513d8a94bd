"""Runs of several processes on one machine, and what each of them ended with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from helpers.common import Regressor, loader, regression_data, trainer, weights
from helpers.plain import TWACallback
from helpers.resume import state


class Wide(Regressor):
    """Four tiles of 8192 columns, so that up to three processes have columns to share."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 120), nn.Tanh(), nn.Linear(120, 240), nn.Tanh(), nn.Linear(240, 1)
        )


class Strided(Sampler):
    """In order, every second sample where there are two processes: together they have the batches
    of one. Lightning's own sampler for training shuffles always.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def _mine(self) -> range:
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return range(rank, self.size, torch.distributed.get_world_size() if distributed else 1)

    def __len__(self) -> int:
        return len(self._mine())

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine())


def strided(processes: int, n: int = 64, seed: int = 0, batch: int = 16) -> DataLoader:
    return DataLoader(regression_data(n, seed), batch // processes, sampler=Strided(n))


class Report(L.Callback):
    """Writes what this rank holds at the end, and after every step whether the weights moved."""

    def __init__(self, twa: TWACallback, folder: Path) -> None:
        self.twa, self.folder = twa, folder
        self.steps: list[tuple[str, Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        torch.set_num_threads(1)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append((self.twa.phase, weights(pl_module)))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(
            {
                "phase": self.twa.phase,
                "state": state(pl_module),
                "averaging_weights": self.twa.averaging_weights,
                "candidate_names": self.twa.candidate_names,
                "candidates": [dict(c.parameters) for c in self.twa._run.store],
                "optimizers": [type(o).__name__ for o in trainer.optimizers],
                "steps": self.steps,
                "extra": getattr(pl_module, "extra", None),
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def fit(
    folder: Path,
    twa: TWACallback,
    module: L.LightningModule,
    processes: int = 2,
    callbacks: Any = (),
    ckpt_path: Path | None = None,
    strategy: Any = "ddp_fork",
    train: DataLoader | None = None,
    val: DataLoader | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Fit with 64 training and 32 validation samples in global batches of 16; one report a rank."""
    folder.mkdir(exist_ok=True)
    several: dict[str, Any] = {} if processes == 1 else {"strategy": strategy, "devices": processes}
    L.seed_everything(1, verbose=False)
    the_trainer = trainer(
        folder, callbacks=[twa, *callbacks, Report(twa, folder)], **several, **kwargs
    )
    the_trainer.fit(
        module,
        train or loader(batch_size=16 // processes),
        val or loader(32, 16 // processes, seed=1),
        ckpt_path=ckpt_path,
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
