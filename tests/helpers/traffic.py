"""What a rank puts into collectives, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from helpers.ddp import fit
from helpers.plain import TWACallback

# Every collective of torch.distributed, and which of its arguments is what this process puts in.
COLLECTIVES = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "gather": 0,
    "scatter": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "send": 0,
    "isend": 0,
    "barrier": None,
    "monitored_barrier": None,
    "all_gather_object": None,
    "gather_object": None,
    "broadcast_object_list": None,
    "scatter_object_list": None,
}


class Traffic(L.Callback):
    """Counts the elements that this rank's training steps put into collectives, by collective."""

    def __init__(self, twa: TWACallback, folder: Path) -> None:
        self.twa, self.folder = twa, folder
        self.now: dict[str, int] = {}
        self.steps: list[tuple[str, dict[str, int]]] = []

    def _count(self, name: str, argument: int | None) -> Any:
        plain = getattr(torch.distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            values = args[argument] if argument is not None else ()
            size = values.numel() if isinstance(values, Tensor) else sum(v.numel() for v in values)
            self.now[name] = self.now.get(name, 0) + size
            return plain(*args, **kwargs)

        return counted

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def count_bucket(group, bucket):  # torch refuses other annotations
            return allreduce_hook(group, bucket)  # through torch.distributed.all_reduce

        trainer.strategy.model.register_comm_hook(None, count_bucket)
        known = {name for name in COLLECTIVES if hasattr(torch.distributed, name)}
        for name in known:
            setattr(torch.distributed, name, self._count(name, COLLECTIVES[name]))

    def on_train_batch_start(self, *args: Any) -> None:
        self.now = {}

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        self.flag = trainer.strategy.model.require_backward_grad_sync

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps.append((self.twa.phase, dict(self.now)))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        after = trainer.strategy.model.require_backward_grad_sync
        torch.save((self.steps, self.flag, after), self.folder / f"traffic{trainer.global_rank}.pt")


def traffic(folder: Path, twa: TWACallback, module: L.LightningModule, **kwargs: Any) -> Any:
    fit(folder, twa, module, callbacks=(Traffic(twa, folder),), **kwargs)
    return [torch.load(folder / f"traffic{rank}.pt", weights_only=True) for rank in range(2)]
