"""Whole runs whose candidates, on the CPU, are taken as those of a device that goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.common import Regressor
from helpers.ddp import fit
from helpers.resume import equal
from helpers.storage import twa
from lightning_twa import CollectConfig, StorageConfig
from lightning_twa.candidates import store


class Broken(Regressor):
    """Has a weight that is not finite from some step on, in some processes."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.current_epoch == 2 and self.trainer.global_rank in self.ranks:
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] = torch.nan


@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validate_average": True},
        {"collect": CollectConfig(start=0, power_averages=(0.1,), max_candidates=2)},
        {"collect": CollectConfig(start=0, power_averages=(0.1,), dense=True)},
    ],
    ids=["plain", "validated", "full window", "dense"],
)
def test_a_run_has_the_same_result(tmp_path, monkeypatch, processes, kind, options) -> None:
    storage = StorageConfig(kind=kind)
    module = Regressor()
    other = copy.deepcopy(module)
    plain = fit(tmp_path / "plain", twa(storage=storage, **options), module, processes)
    monkeypatch.setattr(store, "PINNING", {"cpu"})
    found = fit(tmp_path / "aside", twa(storage=storage, **options), other, processes)
    for rank in range(processes):
        assert equal(found[rank]["state"], plain[rank]["state"])
        assert found[rank]["candidate_names"] == plain[rank]["candidate_names"]


@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_what_is_not_finite_in_one_process_ends_all(tmp_path, monkeypatch, ranks) -> None:
    monkeypatch.setattr(store, "PINNING", {"cpu"})
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"'epoch=2', tensor .* holds [0-9]+ NaN"
    ):
        fit(tmp_path, twa(storage=StorageConfig(kind="memory")), Broken(ranks))
