"""The phase's dataloader, where validation or training have the very object too."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler

from helpers.common import Regressor, loader, regression_data, trainer
from helpers.plain import TWACallback
from helpers.runs import fit_fails

pytestmark = pytest.mark.filterwarnings(
    "ignore:TWACallback.data='val'. trains",
    "ignore:Your .val_dataloader.'s sampler has shuffling enabled",
    "ignore:'set_vital' is deprecated",  # of torchdata
)

DATA = regression_data(48, seed=1)  # six batches of 8
PERSISTENT = {"num_workers": 1, "persistent_workers": True}


class Own(DataLoader):
    """A class of the user's."""


def stateful(**kwargs: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(DATA, 8, **kwargs)


KINDS = {
    "plain": lambda **how: DataLoader(DATA, 8, **how),
    "sampler": lambda **how: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(48)), **how),
    "batch sampler": lambda **how: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=False), **how
    ),
    "class": lambda **how: Own(DATA, 8, **how),
    "stateful": stateful,
}
LONG = [
    pytest.param(kind, how, marks=pytest.mark.long)
    for kind in KINDS
    for how in ({}, PERSISTENT)
    if (kind, how) != ("sampler", PERSISTENT)
]


class Counts(Regressor):
    """Notes what the phase is trained on, and how many batches are validated in each epoch."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.trained: list[Tensor] = []
        self.validated: list[int] = []
        self.shared = [shared]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["one"]
        if self.trainer.current_epoch == 5 and torch.is_grad_enabled():
            self.trained.append(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.trainer.current_epoch)

    def twa_dataloader(self) -> Any:
        return self.shared[0]


@pytest.mark.matrix(2)
@pytest.mark.parametrize(("kind", "how"), [("sampler", PERSISTENT), *LONG])
@pytest.mark.parametrize("data", ["val", "twa"])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_every_sample_is_trained_on_in_an_epoch(tmp_path, kind, how, data, interval) -> None:
    L.seed_everything(5, verbose=False)
    shared = KINDS[kind](**how)
    module, twa = Counts(shared), TWACallback(start_epoch=4, data=data)
    the_trainer = trainer(
        tmp_path, callbacks=[twa], val_check_interval=interval, num_sanity_val_steps=0
    )
    the_trainer.fit(module, loader(), shared)
    assert the_trainer.global_step == 4 * 4 + 2 * 6
    rows = {tuple(row.tolist()) for batch in module.trained for row in batch}
    assert rows == {tuple(row.tolist()) for row, _ in DATA}
    assert module.validated.count(5) == 6 / interval


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_combined_loader_that_holds_the_validation_data(tmp_path, mode) -> None:
    shared = KINDS["sampler"](**PERSISTENT)
    combined = CombinedLoader({"one": shared}, mode)
    module = Counts(combined)
    twa = TWACallback(start_epoch=4, data="twa")
    the_trainer = trainer(tmp_path, callbacks=[twa], val_check_interval=0.5)
    the_trainer.fit(module, loader(), shared)
    rows = {tuple(row.tolist()) for batch in module.trained for row in batch}
    assert rows == {tuple(row.tolist()) for row, _ in DATA}


def test_a_sequential_combined_loader_is_refused_before_training(tmp_path) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, data="twa"),
        "The twa_dataloader() hook returned a CombinedLoader(mode='sequential'), on which a "
        "Trainer cannot train. Use mode='min_size', 'max_size' or 'max_size_cycle'.",
        Counts(CombinedLoader([KINDS["plain"]()], "sequential")),
    )
