"""Phases that are made to fail, and what a run must end with then."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import StorageConfig, SubspaceConfig
from lightning_twa.phases import optimize, span
from lightning_twa.subspace import Subspace


def twa(start_epoch: int = 3, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


def planned(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("planned")


def break_step(monkeypatch: Any, at: int, error: Exception | None = None) -> None:
    """Let projecting the gradient fail from a step on."""
    project, calls = Subspace.project, [0]

    def failing(self: Subspace, gradients: Any) -> Any:
        calls[0] += 1
        if calls[0] >= at:
            raise error or RuntimeError("planned")
        return project(self, gradients)

    monkeypatch.setattr(Subspace, "project", failing)


class Watch(L.Callback):
    """Weights at the start of every epoch, of every step and in every validation."""

    def __init__(self) -> None:
        self.epochs: list[Any] = []
        self.steps: list[Any] = []
        self.validated: list[Any] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs.append(weights(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append(weights(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(state(pl_module))


def mean_of(callback: TWACallback, module: L.LightningModule) -> torch.Tensor:
    """The uniform average of the candidates, rounded as in the module."""
    members = callback.candidates
    parts = []
    for name, p in module.named_parameters():
        total = sum(c.parameters[name].double() for c in members) / len(members)
        parts.append(total.to(p.dtype).double().reshape(-1))
    return torch.cat(parts)


def fit(tmp_path: Path, callback: TWACallback, module: Any = None, **kwargs: Any) -> Any:
    """A run with checkpoints: module, Trainer, what was watched."""
    module = module or Regressor(batchnorm=True)
    watch, saver = Watch(), ModelCheckpoint(tmp_path / "k", save_last=True)
    callbacks = [callback, watch, *kwargs.pop("callbacks", [saver])]
    train = kwargs.pop("train", None) or loader()
    the_trainer = trainer(
        tmp_path,
        **{"max_epochs": 9, "enable_checkpointing": True, **kwargs},
        callbacks=callbacks,
    )
    the_trainer.fit(module, train, loader(32, seed=1))
    return module, the_trainer, watch


def check_sound_end(tmp_path: Path, callback: TWACallback, module: Any, watch: Watch) -> None:
    """Model, validation, files and reports have the uniform average."""
    n = callback.num_candidates
    assert callback.phase == "done"
    assert torch.equal(callback.averaging_weights, torch.full((n, 1), 1 / n, dtype=torch.float64))
    assert callback.block_names == ["global"]
    assert torch.equal(weights(module), mean_of(callback, module))
    assert equal(watch.validated[-1], state(module))
    last = torch.load(tmp_path / "k" / "last.ckpt", weights_only=True)
    assert equal(dict(last["state_dict"]), state(module))
    assert last["callbacks"]["TWACallback"]["phase"] == "done"
    file = torch.load(callback.average_path, weights_only=True)
    assert equal(dict(file["state_dict"]), state(module))
    assert equal(callback.average_state_dict(), state(module))


def run_from_files(tmp_path: Path, text: str, module: Any) -> TWACallback:
    """What the warning says can be done, done."""
    call = re.search(r"fit again with (TWACallback\(.*\)), a new Trainer", text).group(1)
    again: TWACallback = eval(call, {"TWACallback": TWACallback, "CollectConfig": CollectConfig})
    trainer(tmp_path, callbacks=[again], max_epochs=3).fit(module, loader(), loader(32, seed=1))
    return again


def break_switch(monkeypatch: Any, where: str) -> None:
    where_to = {
        "build": (span, "build_subspace"),
        "choose": (span, "decide"),
        "optimizer": (optimize, "SubspaceOptimizer"),
        "data": (optimize.Switch, "borrow"),
        "report": (optimize.report, "switch_report"),
    }
    monkeypatch.setattr(*where_to[where], planned)


KINDS: dict[str, dict[str, Any]] = {
    "bits": {"subspace": SubspaceConfig(bits=3, blocks="tensor")},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "val": {"data": "val"},
    "averages": {"collect": CollectConfig(start=0, ema_decays=(0.5,))},
    "steps": {"collect": CollectConfig(start=0, every_n_train_steps=3, max_candidates=3)},
    "disk": {"storage": StorageConfig(kind="disk")},
    "thinned disk": {
        "storage": StorageConfig(kind="disk"),
        "collect": CollectConfig(start=0, max_candidates=2),
    },
    "bfloat16": {"storage": StorageConfig(dtype="bfloat16")},
    "validated": {"validate_average": True},
}
