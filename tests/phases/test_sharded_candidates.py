"""Candidates of sharded parameters: running averages, and those in files."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import Regressor
from helpers.plain import CollectConfig
from helpers.resume import equal
from helpers.sharded import MARKS, Sharded, Split, Unsplit, fit
from lightning_twa import SolverConfig, StorageConfig, TWACallback
from lightning_twa.candidates import SubspaceFiles

pytestmark = MARKS

AVERAGES = {"collect": CollectConfig(start=0, ema_decays=(0.5, 0.9))}
TENSOR_PARALLEL = {"data_parallel_size": 1, "tensor_parallel_size": 2}


def close(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for report in several:
        assert report["phase"] == "done"
        assert equal(report["steps"], several[0]["steps"])
    for (_, a), (_, b) in zip(one["steps"], several[0]["steps"], strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5
    weights = [report["averaging_weights"] for report in (one, several[0])]
    assert weights[0].shape == weights[1].shape
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_running_averages_equal_those_of_one_process(tmp_path, processes) -> None:
    module = Sharded()
    (one,) = fit(tmp_path / "one", deepcopy(module), 1, AVERAGES)
    several = fit(tmp_path / "several", module, processes, AVERAGES)
    assert one["averaging_weights"].shape[0] == 5
    close(one, several)


@pytest.mark.long
def test_running_averages_with_tensor_parallelism(tmp_path) -> None:
    how = {"strategy_options": TENSOR_PARALLEL}
    (one,) = fit(tmp_path / "one", Unsplit(), 1, AVERAGES)
    close(one, fit(tmp_path / "two", Split(), 2, AVERAGES, **how))


@pytest.mark.parametrize("epoch", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("uniform", [False, pytest.param(True, marks=pytest.mark.long)])
def test_running_averages_travel_in_files(tmp_path, epoch, uniform) -> None:
    options = {**AVERAGES, **({"solver": SolverConfig(name="uniform")} if uniform else {})}
    saved = tmp_path / "saved"
    whole = fit(tmp_path / "whole", Sharded(), 2, options, save_to=saved)
    parked = [*(tmp_path / "candidates").rglob("ema(*)-*")]
    epochs = 4 if uniform else 3  # of which checkpoints are gone on from
    assert len(parked) == epochs * len(AVERAGES["collect"].ema_decays) * 2
    path = saved / f"epoch={epoch}.ckpt"
    resumed = fit(tmp_path / "resumed", Sharded(), 2, options, ckpt_path=path)
    for a, b in zip(whole, resumed, strict=True):
        assert equal(a["steps"][-len(b["steps"]) :], b["steps"])
        assert equal(a["averaging_weights"], b["averaging_weights"])
        assert equal(a["state"], b["state"])


def files(folder: Path, kind: type[Regressor], n: int = 3) -> list[str]:
    folder.mkdir()
    paths = []
    for i in range(n):
        torch.manual_seed(20 + i)
        module = kind()
        if kind is Unsplit:
            module.configure_model()
        torch.save(module.state_dict(), folder / f"{i}.pt")
        paths.append(str(folder / f"{i}.pt"))
    return paths


@pytest.mark.parametrize("start_epoch", [0, 3])
def test_candidates_from_files_are_read_shard_by_shard(tmp_path, start_epoch) -> None:
    paths = files(tmp_path / "soup", Sharded)
    collect = CollectConfig(checkpoints=paths, start=0 if start_epoch else None)
    options = {"start_epoch": start_epoch, "collect": collect}
    module = Sharded()
    (one,) = fit(tmp_path / "one", deepcopy(module), 1, options)
    assert one["averaging_weights"].shape[0] == 3 + start_epoch
    close(one, fit(tmp_path / "two", module, 2, options))


@pytest.mark.long
def test_candidates_from_files_with_tensor_parallelism(tmp_path) -> None:
    paths = files(tmp_path / "soup", Unsplit)
    options = {"start_epoch": 0, "collect": CollectConfig(checkpoints=paths)}
    how = {"strategy_options": TENSOR_PARALLEL}
    (one,) = fit(tmp_path / "one", Unsplit(), 1, options)
    close(one, fit(tmp_path / "two", Split(), 2, options, **how))


class LeavesTheGroup(Sharded):
    """Asks for the candidates when the processes' group is gone."""

    def teardown(self, stage: str) -> None:
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, TWACallback))
        rank = self.trainer.global_rank
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        parts = [dict(candidate.parameters) for candidate in callback.candidates]
        torch.save(parts, Path(self.trainer.default_root_dir) / f"parts{rank}.pt")


def test_candidates_of_shards_when_the_group_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = str(tmp_path / "c")
    storage = {"storage": StorageConfig(kind="disk", dirpath=where, cache_subspace=True)}
    monkeypatch.setattr(SubspaceFiles, "delete", lambda self: None)
    fit(tmp_path / "whole", Sharded(), 2, storage, save_to=tmp_path / "saved")
    path = tmp_path / "saved" / "epoch=3.ckpt"
    folder = tmp_path / "resumed"
    folder.mkdir()
    fit(folder, LeavesTheGroup(), 2, storage, ckpt_path=path)
    found = [torch.load(folder / f"parts{rank}.pt") for rank in range(2)]
    assert len(found[0]) == len(found[1]) == 3
    sizes = [sum(t.numel() for t in parts[0].values()) for parts in found]
    whole = sum(p.numel() for p in Sharded().parameters())
    assert sum(sizes) >= whole > max(sizes), "each has its own"
    assert not equal(found[0][0], found[1][0])
