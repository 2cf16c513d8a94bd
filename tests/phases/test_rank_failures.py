"""An error on one rank is an error on all, and nothing hangs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers.common import Regressor
from helpers.ddp import Wide, fit
from helpers.plain import CollectConfig
from helpers.resume import equal, twa
from lightning_twa.machine import rank
from lightning_twa.subspace import Subspace, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class Fails(Regressor):
    """One rank raises in the phase."""

    def __init__(self, rank: int, where: str) -> None:
        super().__init__(batchnorm=True)
        self.rank, self.where = rank, where

    def _maybe(self, where: str) -> None:
        if (self.where, self.rank, self.trainer.current_epoch) == (
            where,
            self.trainer.global_rank,
            5 if where == "re-estimation" else 4,
        ):
            raise ValueError("planned")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._maybe("training" if torch.is_grad_enabled() else "re-estimation")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._maybe("validation")
        super().validation_step(batch, batch_idx)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_an_exception_on_one_rank_does_not_hang(tmp_path, where, rank) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="planned"):
        fit(tmp_path, twa(), Fails(rank, where))
    assert not list(tmp_path.glob("rank*.pt"))


@pytest.mark.filterwarnings("ignore:BatchNorm statistics could not be re-estimated")
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_cannot_reestimate_batchnorm_no_rank_does(tmp_path, rank) -> None:
    two = fit(tmp_path, twa(), Fails(rank, "re-estimation"))
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(two[0]["state"], two[1]["state"])
    assert int(two[0]["state"]["net.1.num_batches_tracked"]) > 4, "the counter of training"


def test_errors_before_training_do_not_hang(tmp_path) -> None:
    few = twa(collect=CollectConfig(start=3, every_n_train_steps=4))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="at least two cand"):
        fit(tmp_path, few, Regressor())


class Overflows(Wide):
    """One rank's loss is infinite once in the phase."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bad = (self.trainer.current_epoch, batch_idx, self.trainer.global_rank) == (4, 1, 1)
        return loss * torch.inf if bad else loss


@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path, distribute) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    two = fit(
        tmp_path,
        twa(distribute=distribute),
        Overflows(),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    assert equal(two[0], two[1])
    phase = [weights for name, weights in two[0]["steps"] if name != "collect"]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(phase)]
    assert moved == [False, True, True, True, True, True, True]


def on_one_rank(monkeypatch: Any, target: Any, name: str, failing: int, at: int) -> None:
    """Let a function fail in one process, from a call on."""
    original, calls = getattr(target, name), [0]

    def act(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if rank() == failing and calls[0] >= at:
            raise RuntimeError("planned, here")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, act)


@pytest.mark.matrix(3)
@pytest.mark.filterwarnings("ignore:The TWA phase")
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("target", "name", "at", "steps"),
    [
        (build, "_empty_directions", 1, 1),
        (build, "_check", 1, 1),
        (Subspace, "project", 2, 2),
    ],
)
@pytest.mark.parametrize("distribute", ["replicate", pytest.param("shard", marks=pytest.mark.long)])
def test_a_phase_that_fails_on_one_rank_falls_back_on_all(
    tmp_path, monkeypatch, distribute, target, name, at, steps, failing
) -> None:
    on_one_rank(monkeypatch, target, name, failing, at)
    callback = twa(start_epoch=3, distribute=distribute)
    two = fit(tmp_path, callback, Wide())
    for report in two:
        assert report["phase"] == "done"
        assert torch.equal(report["averaging_weights"].flatten(), torch.ones(2).double() / 2)
    assert equal(two[0]["state"], two[1]["state"])
    mean = sum(c["net.0.weight"].double() for c in two[0]["candidates"]) / 2
    assert torch.equal(two[0]["state"]["net.0.weight"], mean.float())
    assert len(two[0]["steps"]) == 3 * 4 + steps
    (folder,) = (tmp_path / "twa_candidates").glob("version_*")
    assert len(list(folder.glob("*.safetensors"))) == 2
