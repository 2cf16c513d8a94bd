"""FSDP2 and tensor parallelism through ``ModelParallelStrategy``, on the CPU."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from helpers.common import Regressor, flat, loader, trainer
from helpers.ddp import strided
from helpers.processes import run
from helpers.resume import equal
from lightning_twa import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig, TWACallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(
        torch.__version__ < "2.6", reason="torch's FSDP2 on the CPU needs torch 2.6"
    ),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # Lightning's calls into torch
    pytest.mark.filterwarnings("ignore:.*torch.distributed.checkpoint.*"),
]


class Sharded(Regressor):
    """Two layers, the second with fewer rows than processes; fully sharded."""

    def __init__(self, batchnorm: bool = False) -> None:
        super().__init__(batchnorm)
        self.net = nn.Sequential(
            nn.Linear(6, 15), *([nn.BatchNorm1d(15)] if batchnorm else []), nn.Tanh(),
            nn.Linear(15, 1),
        )  # fmt: skip

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed._composable.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Split(Sharded):
    """The first layer split by columns and the second by rows: tensor parallelism."""

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        self.net[0] = nn.Linear(6, 16)
        self.net[2] = nn.Linear(16, 1)
        parallelize_module(
            self.net,
            self.device_mesh["tensor_parallel"],
            {"0": ColwiseParallel(), "2": RowwiseParallel()},
        )


class Unsplit(Split):
    """The same weights in one process."""

    def configure_model(self) -> None:
        self.net[0] = nn.Linear(6, 16)
        self.net[2] = nn.Linear(16, 1)


def whole(module: nn.Module, buffers: bool = True) -> dict[str, Tensor]:
    """The state dict, or its parameters, assembled on every process."""
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in module.state_dict().items()
        if buffers or name in dict(module.named_parameters())
    }


class Report(L.Callback):
    """The assembled weights after every step, and the end."""

    def __init__(self, twa: TWACallback, folder: Path) -> None:
        self.twa, self.folder = twa, folder
        self.steps: list[tuple[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append((self.twa.phase, flat(whole(pl_module, buffers=False))))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        report = {
            "phase": self.twa.phase,
            "state": whole(pl_module),
            "averaging_weights": self.twa.averaging_weights,
            "steps": self.steps,
        }
        self.folder.mkdir(exist_ok=True, parents=True)
        torch.save(report, self.folder / f"rank{trainer.global_rank}.pt")


def twa(folder: Path, **kwargs: Any) -> TWACallback:
    defaults = {"start_epoch": 3, "collect": CollectConfig(start=0)}
    storage = StorageConfig(dirpath=str(folder.parent / "candidates"))
    return TWACallback(**{**defaults, "storage": storage, **kwargs})


def fit(
    folder: Path,
    module: L.LightningModule,
    processes: int,
    twa_options: dict[str, Any],
    ckpt_path: Path | None = None,
    save_to: Path | None = None,
    strategy_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Fit in so many processes with global batches of 12; one report a rank."""
    options = {"data_parallel_size": processes, "tensor_parallel_size": 1}
    options.update(strategy_options or {})
    data_parallel = options["data_parallel_size"]

    def work() -> None:
        L.seed_everything(1, verbose=False)
        the_twa = twa(folder, **twa_options)
        callbacks = [the_twa, Report(the_twa, folder)]
        if save_to is not None:
            callbacks.append(
                ModelCheckpoint(save_to, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            )
        several: dict[str, Any] = {}
        if processes > 1:
            several = {"strategy": ModelParallelStrategy(**options), "devices": processes}
        the_trainer = trainer(
            folder, max_epochs=5, callbacks=callbacks, use_distributed_sampler=False,
            enable_checkpointing=save_to is not None, **several, **kwargs
        )  # fmt: skip
        the_trainer.fit(
            module,
            strided(processes, 60, batch=12) if data_parallel > 1 else loader(60, 12),
            strided(processes, 30, seed=1, batch=6) if data_parallel > 1 else loader(30, 6, seed=1),
            ckpt_path=ckpt_path,
        )

    if processes == 1:
        work()
    else:
        run(work, processes)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


LR = SolverConfig(lr=0.1)
BASES: dict[str, dict[str, Any]] = {
    "pca": {},
    "pca with a block per tensor": {"subspace": SubspaceConfig(blocks="tensor")},
    "candidates": {"subspace": SubspaceConfig(basis="candidates"), "solver": LR},
    "orthonormal": {"subspace": SubspaceConfig(basis="orthonormal"), "solver": LR},
}


# `make test` has three bases and both numbers of processes.
SOME = [("pca", 3), ("pca with a block per tensor", 2), ("orthonormal", 2)]
ALL = itertools.product(BASES, [2, 3])


@pytest.mark.parametrize(
    ("basis", "processes"),
    [*SOME, *(pytest.param(*m, marks=pytest.mark.long) for m in ALL if m not in SOME)],
)
def test_shards_equal_one_process_on_the_same_global_batches(tmp_path, basis, processes) -> None:
    module = Sharded()
    (one,) = fit(tmp_path / "one", deepcopy(module), 1, BASES[basis])
    several = fit(tmp_path / "several", module, processes, BASES[basis])
    for report in several:
        assert report["phase"] == "done"
        assert equal(report["steps"], several[0]["steps"])
        assert torch.equal(report["averaging_weights"], several[0]["averaging_weights"])
    for (phase_one, a), (phase, b) in zip(one["steps"], several[0]["steps"], strict=True):
        assert phase_one == phase
        assert float((a - b).norm() / a.norm()) < 1e-5
    torch.testing.assert_close(
        several[0]["averaging_weights"], one["averaging_weights"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("how", [{"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}])
def test_gradients_that_are_clipped_and_accumulated(tmp_path, how) -> None:
    module = Sharded()
    (one,) = fit(tmp_path / "one", deepcopy(module), 1, {}, **how)
    first, second = fit(tmp_path / "two", module, 2, {}, **how)
    assert equal(first["steps"], second["steps"])
    for (_, a), (_, b) in zip(one["steps"], first["steps"], strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


def test_the_average_of_the_candidates_is_validated(tmp_path) -> None:
    """Shards are swapped in and out of gathered parameters."""
    module = Sharded(batchnorm=True)
    plain = fit(tmp_path / "plain", deepcopy(module), 2, {})
    swapped = fit(tmp_path / "swapped", module, 2, {"validate_average": True})
    assert equal(plain[0]["steps"], swapped[0]["steps"])


@pytest.mark.parametrize("bits", [4, pytest.param(16, marks=pytest.mark.long)])
def test_packed_shards(tmp_path, bits) -> None:
    """Groups end where shards do, so codes are not those of one process; the result is close."""
    options = {"subspace": SubspaceConfig(bits=bits)}
    module = Sharded()
    exact, packed = (
        fit(tmp_path / str(i), deepcopy(module), 2, o)[0]["state"]
        for i, o in enumerate(({}, options))
    )
    assert float((flat(packed) - flat(exact)).norm() / flat(exact).norm()) < 0.05


def test_tensor_parallelism(tmp_path) -> None:
    """Both processes see the same batches; replicated and plain parameters count once."""
    first, second = fit(
        tmp_path / "two",
        Split(),
        2,
        {},
        strategy_options={"data_parallel_size": 1, "tensor_parallel_size": 2},
    )
    assert first["phase"] == "done"
    assert equal(first["steps"], second["steps"])
    assert torch.equal(first["averaging_weights"], second["averaging_weights"])
    (one,) = fit(tmp_path / "one", Unsplit(), 1, {})
    for (_, a), (_, b) in zip(one["steps"], first["steps"], strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


FILES = {"a file a rank": True, "one file": False}
# `make test` resumes once from each kind of checkpoint, while collecting and in the phase.
SOME_RESUMED = [(1, "a file a rank"), (3, "one file")]
ALL_RESUMED = itertools.product([1, 2, 3], FILES)


@pytest.mark.parametrize(
    ("epoch", "kind"),
    [
        *SOME_RESUMED,
        *(pytest.param(*m, marks=pytest.mark.long) for m in ALL_RESUMED if m not in SOME_RESUMED),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch, kind) -> None:
    distributed = FILES[kind]
    module = Sharded(batchnorm=True)
    how = {"strategy_options": {"save_distributed_checkpoint": distributed}}
    saved = tmp_path / "saved"
    uninterrupted = fit(tmp_path / "whole", deepcopy(module), 2, {}, save_to=saved, **how)
    path = saved / f"epoch={epoch}.ckpt"
    resumed = fit(tmp_path / "resumed", Sharded(batchnorm=True), 2, {}, ckpt_path=path, **how)
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert len(b["steps"]) == 5 * (4 - epoch)
        assert equal(a["steps"][-len(b["steps"]) :], b["steps"])
        assert equal(a["state"], b["state"])
        assert equal(a["averaging_weights"], b["averaging_weights"])
    assert (saved / "twa.ckpt").is_dir() is distributed
    if not distributed:
        last = torch.load(saved / "epoch=4.ckpt", weights_only=True)
        average = torch.load(saved / "twa.ckpt", weights_only=True)
        assert equal(dict(average["state_dict"]), dict(last["state_dict"]))
        plain = Sharded(batchnorm=True)
        plain.load_state_dict(last["state_dict"])
        assert equal(dict(plain.state_dict()), uninterrupted[0]["state"])


@pytest.mark.long
def test_the_file_of_the_average_is_that_of_the_last_cycle(tmp_path) -> None:
    """A directory, which replaces that of the cycle before."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    options = {
        "cycles": 2,
        "start_epoch": 1,
        "collect": CollectConfig(start=0, every_n_train_steps=2),
    }
    how = {"strategy_options": {"save_distributed_checkpoint": True}}
    (report, _) = fit(tmp_path / "run", Sharded(), 2, options, save_to=tmp_path / "saved", **how)
    assert report["phase"] == "done"
    names = [path.name for path in (tmp_path / "saved").iterdir() if "twa" in path.name]
    assert names == ["twa.ckpt"]
    dcp_to_torch_save(tmp_path / "saved" / "twa.ckpt", tmp_path / "one.pt")
    held = torch.load(tmp_path / "one.pt", weights_only=True)["state_dict"]
    assert equal(dict(held), report["state"])
