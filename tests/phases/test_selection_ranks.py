"""Several processes choose the same, and what one process with the same data would choose."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from helpers.common import Regressor, loader
from helpers.ddp import fit, strided
from helpers.resume import equal
from helpers.sharded import MARKS, Sharded
from helpers.sharded import fit as fit_sharded
from lightning_twa import CollectConfig, TWACallback

pytestmark = MARKS

COLLECT = CollectConfig(start=1, power_averages=(0.05, 0.13))
SHARDED = {"collect": COLLECT, "heldout": "auto"}


def make() -> TWACallback:
    return TWACallback(4, collect=COLLECT)


class Telling(Regressor):
    """Remembers what was measured, as tensors that a report can hold."""

    def on_train_end(self) -> None:
        result = next(c for c in self.trainer.callbacks if isinstance(c, TWACallback)).result
        losses = [*result.losses.values(), *result.path.values()]
        self.extra = [torch.tensor(losses), torch.tensor(result.batches)]


def test_ddp_chooses_as_one_process_with_the_same_batches(tmp_path: Path) -> None:
    module = Telling()
    held_out = loader(32, 16, seed=1)
    (one,) = fit(tmp_path / "one", make(), deepcopy(module), 1, train=strided(1), val=held_out)
    halves, own = loader(32, 8, seed=1), {"use_distributed_sampler": False}
    several = fit(tmp_path / "two", make(), module, train=strided(2), val=halves, **own)
    first, second = several
    assert equal(first["state"], second["state"])
    assert equal(first["extra"], second["extra"])  # the losses are those of all processes
    assert equal(first["averaging_weights"], second["averaging_weights"])
    names = ["power(0.05)", "power(0.13)", "mean", "epoch=1", "epoch=2", "epoch=3"]
    assert first["candidate_names"] == one["candidate_names"] == names
    for a, b in zip(one["candidates"], first["candidates"], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [2])
def test_sharded_parameters_choose_the_same(tmp_path: Path, processes: int) -> None:
    module = Sharded()
    (one,) = fit_sharded(tmp_path / "one", deepcopy(module), 1, SHARDED)
    several = fit_sharded(tmp_path / "several", module, processes, SHARDED)
    assert one["averaging_weights"].shape == (5, 1)
    assert equal(several[0]["averaging_weights"], several[1]["averaging_weights"])
    for report in several:
        assert report["phase"] == "done"
        assert equal(report["steps"], several[0]["steps"])


@pytest.mark.parametrize("epoch", [1, pytest.param(3, marks=pytest.mark.long)])
def test_power_averages_of_sharded_parameters_travel_in_files(tmp_path: Path, epoch: int) -> None:
    saved = tmp_path / "saved"
    whole = fit_sharded(tmp_path / "whole", Sharded(), 2, SHARDED, save_to=saved)
    path = saved / f"epoch={epoch}.ckpt"
    again = fit_sharded(tmp_path / "again", Sharded(), 2, SHARDED, ckpt_path=path)
    for one, other in zip(whole, again, strict=True):
        assert equal(one["state"], other["state"])
        assert equal(one["averaging_weights"], other["averaging_weights"])
