"""Directories that cannot be written and memory that is not there are found before training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.common import Regressor, loader, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig
from lightning_twa.phases import room
from lightning_twa.subspace import stored_bytes

GIB = 2**30


def twa(start_epoch: int = 8, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


def refused(tmp_path: Path, callback: TWACallback, module: Any = None, **kwargs: Any) -> str:
    """What ``fit`` says before its first step."""
    kwargs.setdefault("max_epochs", 10)
    the_trainer = trainer(tmp_path, callbacks=[callback], **kwargs)
    with pytest.raises(ValueError, match=r".") as caught:
        the_trainer.fit(module or Regressor(), loader(), loader(32, seed=1))
    assert the_trainer.global_step == 0
    assert callback.candidates == []
    return str(caught.value)


# --- directories


@pytest.mark.parametrize("where", ["dirpath", "default_root_dir"])
def test_a_directory_for_candidates_that_cannot_be_written(tmp_path, where) -> None:
    blocked = tmp_path / ("d" if where == "dirpath" else "twa_candidates")
    blocked.write_text("a file in its place")
    storage = StorageConfig(kind="disk", dirpath=str(blocked) if where == "dirpath" else None)
    assert refused(tmp_path, twa(storage=storage)) == (
        f"The candidates of this run go to files in {blocked}, which cannot be written (Not a "
        f"directory: {blocked}). Set StorageConfig.dirpath to a directory that can, or "
        f"StorageConfig(kind='memory')."
    )


@pytest.mark.parametrize("kind", ["auto", "memory"])
def test_where_memory_will_do_no_directory_is_tried(tmp_path, kind) -> None:
    (tmp_path / "twa_candidates").write_text("a file in its place")
    callback = twa(2, storage=StorageConfig(kind=kind))
    trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(Regressor(), loader())
    assert callback.phase == "done"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
def test_several_processes_share_files_so_they_are_tried_there(tmp_path) -> None:
    (tmp_path / "twa_candidates").write_text("a file in its place")
    the_trainer = trainer(tmp_path, callbacks=[twa(2)], strategy="ddp_fork", devices=2)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="go to files in"):
        the_trainer.fit(Regressor(), loader())


def test_a_name_for_the_average_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    name = str(tmp_path / "file" / "twa.ckpt")
    assert refused(tmp_path, twa(save_average=name)) == (
        f"save_average={name!r} cannot be written (Not a directory: {tmp_path / 'file'}). Name a "
        f"file in a directory that can be written, or use save_average=True, beside the "
        f"checkpoints."
    )
    for directory in (str(tmp_path), f"{tmp_path}/not_there/"):
        text = refused(tmp_path, twa(save_average=directory))
        assert text.startswith(f"save_average={directory!r} is a directory. Name a file in it, suc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "nothing is left behind"


def test_a_run_that_is_not_ours_tries_nothing(tmp_path) -> None:
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "d"))
    (tmp_path / "d").write_text("a file in its place")
    callback = twa(storage=storage, save_average=str(tmp_path))
    the_trainer = trainer(tmp_path, callbacks=[callback], fast_dev_run=True)
    the_trainer.fit(Regressor(), loader())
    the_trainer.validate(Regressor(), loader(), verbose=False)


# --- memory


class Large(Regressor):
    """A million parameters, so that directions take about as many bytes as their entries say."""

    def __init__(self) -> None:
        super().__init__(lr=1e-4)
        self.net = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 1))


D = sum(p.numel() for p in Large().parameters())


def memory(monkeypatch: Any, total: float, free: float | None = None) -> None:
    """So many times ``D`` numbers of float32."""
    monkeypatch.setattr(room, "total_bytes", lambda *args, **kwargs: int(4 * D * total))
    share = total if free is None else free
    monkeypatch.setattr(room, "free_bytes", lambda *args, **kwargs: int(4 * D * share))


def test_a_basis_that_cannot_fit(tmp_path, monkeypatch) -> None:
    """Eight candidates have seven directions and a center."""
    memory(monkeypatch, 8.01)
    callback = twa()
    how: dict[str, Any] = {"max_epochs": 9, "limit_train_batches": 1}
    trainer(tmp_path, callbacks=[callback], **how).fit(Large(), loader())
    assert callback.phase == "done"
    memory(monkeypatch, 7.99)
    text = refused(tmp_path, twa(), Large(), limit_train_batches=1)
    assert text.startswith(
        "The directions of 8 candidates and their center take 30.8 MiB on cpu, which has 30.8 MiB. "
        "What would fit: SubspaceConfig(bits=16) (17.3 MiB), "
    )
    fitting = text.split("What would fit: ")[1]
    assert "group_size=7" in fitting
    assert "rank=6" in fitting
    assert "max_candidates=7" in fitting
    assert "device" not in fitting, "it is the CPU already"
    assert "shard" not in fitting, "there is one process"


CONFIGS: dict[str, Any] = {
    "SubspaceConfig": ("subspace", SubspaceConfig()),
    "CollectConfig": ("collect", CollectConfig(start=0)),
}


class Reached(Exception):
    """Training has started."""


class Stop(Large):
    def on_train_start(self) -> None:
        raise Reached


@pytest.mark.matrix(9)
@pytest.mark.parametrize("total", [4.0, 2.5, 1.3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subspace": SubspaceConfig(bits=16, blocks="tensor")},
        {"subspace": SubspaceConfig(basis="candidates"), "solver": SolverConfig(lr=0.1)},
        {"subspace": SubspaceConfig(parametrization="simplex")},
        {"subspace": SubspaceConfig(parametrization="mask", mask_size=3)},
        {"collect": CollectConfig(start=0, ema_decays=(0.5, 0.9))},
        {"cycles": 2, "start_epoch": 9},
    ],
)
def test_every_setting_that_is_named_fits(tmp_path, monkeypatch, options, total) -> None:
    memory(monkeypatch, total)
    how: dict[str, Any] = {"max_epochs": 20, "limit_train_batches": 1}
    text = refused(tmp_path, twa(**options), Large(), **how)
    named = re.findall(r"(SubspaceConfig|CollectConfig)\((\w+)=(\d+)\)", text)
    assert named or "No single setting" in text
    for config, name, value in named:
        argument, default = CONFIGS[config]
        changed = replace(options.get(argument, default), **{name: int(value)})
        the_trainer = trainer(tmp_path, callbacks=[twa(**{**options, argument: changed})], **how)
        with pytest.raises(Reached):
            the_trainer.fit(Stop(), loader())


def test_more_than_is_free_is_a_warning(tmp_path, monkeypatch) -> None:
    memory(monkeypatch, 100, 4)
    callback = twa()
    how: dict[str, Any] = {"max_epochs": 9, "limit_train_batches": 1}
    with pytest.warns(UserWarning, match=r"30.8 MiB on cpu when the .* only 15.4 MiB of 384.9 MiB"):
        trainer(tmp_path, callbacks=[callback], **how).fit(Large(), loader())
    assert callback.phase == "done"


@pytest.mark.filterwarnings("ignore:TWA will not run", "ignore:TWA never ran")
def test_what_is_not_sure_is_not_refused(tmp_path, monkeypatch) -> None:
    """A phase that will not be reached, and one that may begin with fewer candidates."""
    from lightning.pytorch.callbacks import EarlyStopping

    memory(monkeypatch, 1)
    how: dict[str, Any] = {"max_epochs": 10, "limit_train_batches": 1}
    trainer(tmp_path, callbacks=[twa()], max_steps=4, **how).fit(Large(), loader())
    stop = EarlyStopping("train_loss", patience=0, min_delta=1e9, check_on_train_epoch_end=True)
    callback = twa(start_on_early_stopping=True)
    trainer(tmp_path, callbacks=[callback, stop], **how).fit(Large(), loader())
    assert callback.phase == "done"


def test_what_is_frozen_is_not_counted(tmp_path, monkeypatch) -> None:
    class Adapter(Large):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].requires_grad_(False)

    memory(monkeypatch, 0.2)
    callback = twa()
    how: dict[str, Any] = {"max_epochs": 9, "limit_train_batches": 1}
    trainer(tmp_path, callbacks=[callback], **how).fit(Adapter(), loader())
    assert callback.phase == "done"


def test_another_device_may_have_the_room(tmp_path, monkeypatch) -> None:
    """Shown with a device that this machine need not have."""
    callback, module = twa(), Large()
    the_trainer = trainer(tmp_path, callbacks=[callback])
    the_trainer.strategy.connect(module)
    the_trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 0.1)]
    there = {"cuda": 3, "cpu": 100}
    for name in ("total_bytes", "free_bytes"):
        monkeypatch.setattr(room, name, lambda device, *a: 4 * D * there[device.type])
    need = room._need(callback.settings, the_trainer, module, 8, 0)
    need = replace(need, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"on cuda, which has .* SubspaceConfig\(device='cpu'\)"):
        need.check()
    there["cpu"] = 3
    with pytest.raises(ValueError, match=r"on cuda, which has") as caught:
        need.check()
    assert "device=" not in str(caught.value)


@pytest.mark.matrix(6)
@pytest.mark.parametrize("bits", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("basis", ["pca", "candidates", "orthonormal"])
def test_what_is_expected_is_what_is_taken(tmp_path, bits, basis) -> None:
    solver = None if basis == "pca" else SolverConfig(lr=0.01)
    callback = twa(5, subspace=SubspaceConfig(bits=bits, basis=basis), solver=solver)
    seen: list[Any] = []

    class Look(Regressor):
        def on_train_start(self) -> None:
            need = room._need(callback.settings, self.trainer, self, 5, 0)
            seen.append(need.bytes())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if callback.phase == "optimize":
                subspace = callback._run.optimization.optimizer.subspace
                seen.append(subspace.nbytes)
                assert subspace.stored.nbytes == stored_bytes(
                    subspace.layout, subspace.num_directions, bits
                )

    trainer(tmp_path, callbacks=[callback], max_epochs=6).fit(Look(), loader())
    assert seen[0] == seen[1]


# --- candidates in main memory


def test_candidates_that_main_memory_cannot_hold(tmp_path, monkeypatch) -> None:
    memory(monkeypatch, 6)
    uniform = twa(
        storage=StorageConfig(kind="memory"),
        solver=SolverConfig(name="uniform"),
    )
    how: dict[str, Any] = {"max_epochs": 8, "limit_train_batches": 1}
    text = refused(tmp_path, uniform, Large(), **how)
    assert text == (
        "8 candidates of this model take 30.8 MiB of main memory in each process "
        "(StorageConfig.kind='memory'), which has 23.1 MiB. What would fit: "
        "StorageConfig(kind='auto') (files), StorageConfig(dtype='bfloat16') (15.4 MiB), "
        "CollectConfig(max_candidates=6) (23.1 MiB)."
    )
    callback = twa(storage=StorageConfig(kind="auto"), solver=SolverConfig(name="uniform"))
    trainer(tmp_path, callbacks=[callback], **how).fit(Large(), loader())
    assert callback.phase == "done"


# --- options without effect, devices, data


def test_a_rank_that_drops_nothing(tmp_path) -> None:
    callback = twa(3, subspace=SubspaceConfig(rank=3))
    with pytest.warns(UserWarning, match=r"rank=3 keeps all directions: 3 candidates have 2 at m"):
        trainer(tmp_path, callbacks=[callback], max_epochs=4).fit(Regressor(), loader())


def test_a_device_that_holds_no_values(tmp_path) -> None:
    text = refused(tmp_path, twa(subspace=SubspaceConfig(device="meta")))
    assert text.startswith("SubspaceConfig.device='meta' cannot be used on this machine")


@pytest.mark.parametrize("data", ["val", "twa"])
@pytest.mark.parametrize("value", ["none", "empty", "dropped"])
def test_data_of_the_phase_that_is_not_there(tmp_path, data, value) -> None:
    class Odd(Regressor):
        def make(self) -> Any:
            if value == "none":
                return None
            if value == "empty":
                return DataLoader([], batch_size=4)
            return DataLoader(regression_data(8), batch_size=16, drop_last=True)

        def train_dataloader(self) -> DataLoader:
            return loader()

        def val_dataloader(self) -> Any:
            return self.make() if data == "val" else loader()

        def twa_dataloader(self) -> Any:
            return self.make()

    the_trainer = trainer(tmp_path, callbacks=[twa(data=data)], max_epochs=10, limit_val_batches=0)
    message = (
        "returned None" if value == "none" else f"data='{data}'.* that dataloader has no batch"
    )
    with pytest.raises(ValueError, match=message):
        the_trainer.fit(Odd())
    assert the_trainer.global_step == 0


def test_a_combined_loader_that_validation_uses_too(tmp_path) -> None:
    from lightning.pytorch.utilities import CombinedLoader

    how: dict[str, Any] = {"max_epochs": 10, "num_sanity_val_steps": 0}
    the_trainer = trainer(tmp_path, callbacks=[twa(data="val")], **how)
    with pytest.raises(ValueError, match=r"needs one plain .* twa_dataloader\(\) hook"):
        the_trainer.fit(Regressor(), loader(), CombinedLoader([loader()], "max_size_cycle"))
    assert the_trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_validation_by_time_in_a_phase_on_other_data(tmp_path) -> None:
    """``val_check_interval`` is then no attribute of the Trainer."""
    from lightning.pytorch import Trainer

    options = {"val_check_interval": "00:00:00:01", "check_val_every_n_epoch": None}
    try:
        Trainer(**options, logger=False, accelerator="cpu")
    except Exception as error:
        pytest.skip(f"needs a later version of Lightning: {error}")
    callback = twa(4, data="val")
    the_trainer = trainer(tmp_path, callbacks=[callback], **options)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert callback.phase == "done"
    assert float(callback.averaging_weights.std()) > 0, "learned"
    assert not hasattr(the_trainer, "val_check_interval")
