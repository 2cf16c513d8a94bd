"""Runs that are interrupted at every checkpoint they wrote, and data whose order survives that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from helpers.common import Recorder, Regressor, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback


class EpochOrder(Sampler):
    """A random order that is a function of the epoch: Lightning does not restore a random state."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class ResumableLoader(DataLoader):
    """A loader that goes on in the middle of an epoch: what Lightning asks for there."""

    taken = 0
    skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip, self.taken = self.skip, 0, 0
        for batch in super().__iter__():
            self.taken += 1
            if self.taken > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["taken"] % len(self)


def ordered(n: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader:
    """Batches in an order that depends on the epoch alone, resumable within it."""
    return ResumableLoader(
        regression_data(n, seed), batch_size=batch_size, sampler=EpochOrder(n, seed)
    )


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def twa(**kwargs: Any) -> TWACallback:
    """Candidates of epochs 1 to 3, the phase in epochs 4 and 5, unless told otherwise."""
    return TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs})


@dataclass
class Outcome:
    """What a run ended with."""

    steps: list[Tensor]
    state: dict[str, Tensor]
    user: Any
    callback: dict[str, Any]


def run(
    path: Path,
    make_module: Callable[[], L.LightningModule],
    make_twa: Callable[[], TWACallback | None],
    ckpt_path: str | Path | None = None,
    saver: ModelCheckpoint | None = None,
    train: Callable[[], DataLoader] = ordered,
    **kwargs: Any,
) -> Outcome:
    """One ``fit``; from a checkpoint the module starts from other weights, which must not show."""
    L.seed_everything(1 if ckpt_path is None else 99, verbose=False)
    module, twa = make_module(), make_twa()
    recorder = Recorder(twa or type("NoTWA", (), {"phase": "collect"}))
    callbacks = [twa, recorder, saver]
    the_trainer = trainer(
        path,
        callbacks=[c for c in callbacks if c is not None],
        enable_checkpointing=saver is not None,
        **kwargs,
    )
    the_trainer.fit(module, train(), ordered(32, seed=1), ckpt_path=ckpt_path)
    user = [o.state_dict() for o in the_trainer.optimizers]
    user += [c.scheduler.state_dict() for c in the_trainer.lr_scheduler_configs]
    return Outcome(
        steps=[w for _, w in recorder.steps],
        state=state(module),
        user=user,
        callback={} if twa is None else twa.state_dict(),
    )


def differences(whole: Outcome, resumed: Outcome) -> list[str]:
    """In what a resumed run differs from an uninterrupted one; nothing when they are equal."""
    tail = whole.steps[len(whole.steps) - len(resumed.steps) :]
    found = [] if len(tail) == len(resumed.steps) else ["number of steps"]
    pairs = {
        "weights after a step": (tail, resumed.steps),
        "final weights": (whole.state, resumed.state),
        "optimizer or scheduler state": (whole.user, resumed.user),
        "callback state": (whole.callback, resumed.callback),
    }
    return found + [what for what, (a, b) in pairs.items() if not equal(a, b)]


def saved(path: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(
        path.glob("*=*.ckpt"), key=lambda p: int(re.search(r"step=(\d+)", p.stem).group(1))
    )


def interrupted(tmp_path: Path, epoch: int, **kwargs: Any) -> Path:
    """A checkpoint from the end of an epoch."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, Regressor, lambda: twa(**kwargs), saver=saver)
    return saved(tmp_path)[epoch]
