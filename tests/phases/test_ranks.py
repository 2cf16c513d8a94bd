"""Two processes on the CPU: equal on every rank, and equal to one process on the same batches."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import lightning_twa
from helpers.common import Regressor, flat, regression_data, weights
from helpers.ddp import Wide, fit, strided
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state, twa
from helpers.traffic import traffic
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig
from lightning_twa.subspace.training import exchange

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


SAME = {
    "default": ({}, {}),
    "a block per tensor": ({"subspace": SubspaceConfig(blocks="tensor")}, {}),
    "candidates by steps": ({"collect": CollectConfig(start=2, every_n_train_steps=3)}, {}),
    "clipped by norm": ({}, {"gradient_clip_val": 0.05}),
    "accumulated gradients": ({}, {"accumulate_grad_batches": 2}),
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("case", SAME)
def test_two_processes_equal_one_on_the_same_global_batches(tmp_path, case) -> None:
    kwargs, how = SAME[case]
    check_several_equal_one(tmp_path, Regressor(), kwargs, **how)


LR = SolverConfig(lr=0.1)


BASES = {
    "pca": {},
    "pca with 4 bits": {"subspace": SubspaceConfig(bits=4)},
    "pca with 3 bits and a block per tensor": {"subspace": SubspaceConfig(bits=3, blocks="tensor")},
    "pca with 16 bits and blocks": {"subspace": SubspaceConfig(bits=16, blocks=2000)},
    "candidates": {"subspace": SubspaceConfig(basis="candidates"), "solver": LR},
    "orthonormal": {"subspace": SubspaceConfig(basis="orthonormal", bits=4), "solver": LR},
}


# `make test` has every basis once.
SOME = [
    ("pca", "shard", 2),
    ("pca with 4 bits", "shard", 3),
    ("pca with 3 bits and a block per tensor", "replicate", 2),
    ("pca with 16 bits and blocks", "shard", 2),
    ("candidates", "shard", 2),
    ("orthonormal", "replicate", 3),
]
ALL = itertools.product(BASES, ["replicate", "shard"], [2, 3])


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("basis", "distribute", "processes"),
    [*SOME, *(pytest.param(*m, marks=pytest.mark.long) for m in ALL if m not in SOME)],
)
def test_several_processes_equal_one(tmp_path, basis, distribute, processes) -> None:
    kwargs = {**BASES[basis], "distribute": distribute}
    # In float32 the candidates differ by rounding, which can flip a low-bit code.
    low = kwargs.get("subspace", SubspaceConfig()).bits < 32
    module, how = (Wide().double(), {"precision": "64-true"}) if low else (Wide(), {})
    check_several_equal_one(tmp_path, module, kwargs, processes, **how)


@pytest.mark.parametrize("how", [{"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}])
def test_shards_with_gradients_that_are_averaged_and_accumulated(tmp_path, how) -> None:
    check_several_equal_one(tmp_path, Wide(), {"distribute": "shard"}, **how)


def check_several_equal_one(
    tmp_path: Path, module: Regressor, kwargs: Any, processes: int = 2, **how: Any
) -> None:
    """The same global batches give the same candidates, steps and averaging weights."""
    how = {**how, "use_distributed_sampler": False}
    data = {"n": 60, "batch": 12} if processes == 3 else {}
    alone, shared = strided(1, **data), strided(processes, **data)
    (one,) = fit(tmp_path / "one", twa(**kwargs), deepcopy(module), 1, train=alone, **how)
    two = fit(tmp_path / "two", twa(**kwargs), module, processes, train=shared, **how)
    assert all(equal(two[0], other) for other in two[1:]), "the ranks differ"
    assert torch.equal(weights(module), flat(two[0]["state"])), "the main process has them too"
    assert one["phase"] == two[0]["phase"] == "done"
    assert one["candidate_names"] == two[0]["candidate_names"]
    for a, b in zip(one["candidates"], two[0]["candidates"], strict=True):
        torch.testing.assert_close(flat(b), flat(a), rtol=1e-5, atol=1e-6)
    assert len(one["steps"]) == len(two[0]["steps"])
    for (phase_one, a), (phase_two, b) in zip(one["steps"], two[0]["steps"], strict=True):
        assert phase_one == phase_two
        assert float((a - b).norm() / a.norm()) < 1e-5
    uniform = torch.full_like(one["averaging_weights"], 1 / len(one["candidates"]))
    assert not torch.allclose(one["averaging_weights"], uniform, atol=1e-3), "nothing was learned"
    torch.testing.assert_close(
        two[0]["averaging_weights"], one["averaging_weights"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("data", ["train", "val"])
def test_ranks_hold_equal_weights_after_every_step_and_equal_statistics(tmp_path, data) -> None:
    module = Regressor(batchnorm=True)
    two = fit(
        tmp_path,
        twa(data=data, validate_average=True),
        module,
        val_check_interval=2,
        use_distributed_sampler=False,
        train=strided(2),
        val=strided(2, 32, seed=1),
    )
    assert equal(two[0]["state"], two[1]["state"]), "parameters and buffers"
    assert equal(two[0]["steps"], two[1]["steps"])
    assert equal(two[0]["averaging_weights"], two[1]["averaging_weights"])
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert two[0]["optimizers"] == two[1]["optimizers"] == ["SGD"]
    assert sum(phase != "collect" for phase, _ in two[0]["steps"]) == (8 if data == "train" else 4)

    # each rank's cumulative average over its own batches, then their mean
    final = Regressor(batchnorm=True)
    final.load_state_dict(two[0]["state"])
    x = regression_data().tensors[0]
    inputs = final.net[0](x).double().detach()
    batches = [inputs[rank::2].split(8) for rank in (0, 1)]
    mean = torch.stack([b.mean(0) for rank in batches for b in rank]).mean(0)
    var = torch.stack([b.var(0) for rank in batches for b in rank]).mean(0)
    torch.testing.assert_close(final.net[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final.net[1].running_var.double(), var, rtol=1e-5, atol=1e-6)


def test_twa_v_shares_the_validation_data_between_the_ranks_in_random_order(tmp_path) -> None:
    class Seen(Regressor):
        """Remembers the first input of every sample it trains on in the phase."""

        def __init__(self) -> None:
            super().__init__()
            self.extra: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.current_epoch >= 4 and torch.is_grad_enabled():
                self.extra.append(batch[0][:, 0].clone())
            return super().training_step(batch, batch_idx)

    two = fit(tmp_path, twa(data="val"), Seen())
    every = regression_data(32, seed=1).tensors[0][:, 0].sort().values
    epochs = []
    for epoch in (0, 1):
        shares = [torch.cat(r["extra"][2 * epoch : 2 * epoch + 2]) for r in two]
        assert torch.equal(torch.cat(shares).sort().values, every), "each sample once an epoch"
        epochs.append(shares[0])
    assert not torch.equal(*epochs), "the order was the same in both epochs"


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(
            tmp_path / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )

    how = {"enable_checkpointing": True, "callbacks": [saver()]}
    storage = StorageConfig(dirpath=str(tmp_path / "candidates"))
    whole = fit(tmp_path / "whole", twa(storage=storage), Regressor(batchnorm=True), **how)
    path = tmp_path / "saved" / f"epoch={epoch}.ckpt"
    torch.load(path, weights_only=True)
    module = Regressor(batchnorm=True)
    resumed = fit(tmp_path / "resumed", twa(storage=storage), module, ckpt_path=path)
    for a, b in zip(whole, resumed, strict=True):
        assert equal(a["state"], b["state"])
        assert equal(a["averaging_weights"], b["averaging_weights"])
        assert equal(a["steps"][-len(b["steps"]) :], b["steps"])
        assert len(b["steps"]) == 4 * (5 - epoch)


@pytest.mark.filterwarnings("ignore:You are using .torch.load. with")  # torch 2.4, unpickling
def test_the_main_process_of_spawned_workers_gets_the_average(tmp_path) -> None:
    """What Lightning's own tests run: workers that start from a pickled callback."""
    module = Regressor(batchnorm=True)
    the_twa = twa(solver=SolverConfig(name="adamw"), subspace=SubspaceConfig(blocks=20))
    two = fit(tmp_path, the_twa, module, strategy="ddp_spawn", max_epochs=5)
    assert equal(two[0]["state"], two[1]["state"])
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(state(module), two[0]["state"])


class LooksAtGradients(Regressor):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = float(sum(p.grad.square().sum() for p in self.parameters()))


KEEPS = {
    "clipping by norm": (Regressor, {"gradient_clip_val": 1.0}),
    "clipping by value": (
        Regressor,
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    ),
    "a hook that looks at gradients": (LooksAtGradients, {}),
}


@pytest.mark.parametrize("case", KEEPS)
def test_whoever_looks_at_gradients_sees_their_mean(tmp_path, case) -> None:
    kind, options = KEEPS[case]
    module = kind()
    d = sum(p.numel() for p in module.parameters())
    for steps, flag, _ in traffic(tmp_path, twa(), module, **options):
        assert [s for p, s in steps if p == "optimize"] == [{"all_reduce": d}] * 7
        assert flag is True


@pytest.mark.parametrize(
    ("distribute", "n"),
    [
        ("replicate", 61),  # the last batches are 7 and 6 samples
        ("shard", 64),
        pytest.param("replicate", 64, marks=pytest.mark.long),
        pytest.param("shard", 61, marks=pytest.mark.long),
    ],
)
def test_local_gradients_give_the_same_run_as_averaged_ones(
    tmp_path, monkeypatch, distribute, n
) -> None:
    """Processes count alike, as in DDP, also where their last batches differ in size."""
    module, how = Wide(), {"train": strided(2, n), "use_distributed_sampler": False}
    local = fit(tmp_path / "local", twa(distribute=distribute), deepcopy(module), **how)
    needs = "lightning_twa.phases.ranks._needs_true_gradient"
    monkeypatch.setattr(needs, lambda *args: "a test asks")
    averaged = fit(tmp_path / "averaged", twa(distribute=distribute), module, **how)
    torch.testing.assert_close(
        flat(local[0]["state"]), flat(averaged[0]["state"]), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(
        local[0]["averaging_weights"], averaged[0]["averaging_weights"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.matrix(1)
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}])
def test_ddp_s_own_options(tmp_path, options) -> None:
    """Also when a run is resumed in the phase, with a graph that DDP has not seen so far."""

    def strategy() -> DDPStrategy:
        return DDPStrategy(start_method="fork", **options)

    storage = StorageConfig(dirpath=str(tmp_path / "c"))
    saver = ModelCheckpoint(
        tmp_path / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    module, how = Wide(), {"train": strided(2), "use_distributed_sampler": False}
    plain = fit(tmp_path / "plain", twa(storage=storage), deepcopy(module), **how)
    whole = fit(
        tmp_path / "whole", twa(storage=storage), deepcopy(module), callbacks=[saver],
        strategy=strategy(), enable_checkpointing=True, **how,
    )  # fmt: skip
    torch.testing.assert_close(flat(whole[0]["state"]), flat(plain[0]["state"]))
    path = tmp_path / "saved" / "epoch=4.ckpt"
    resumed = fit(
        tmp_path / "resumed", twa(storage=storage), module, ckpt_path=path,
        strategy=strategy(), **how,
    )  # fmt: skip
    assert equal(whole[0]["state"], resumed[0]["state"])


@pytest.mark.parametrize("sharded", [False, True])
def test_auto_shards_where_memory_is_short_on_any_rank(tmp_path, monkeypatch, sharded) -> None:
    class Says(Wide):
        """Remembers how the phase is shared, as the tensors that a report can hold."""

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 5:
                (callback,) = (
                    c for c in self.trainer.callbacks if isinstance(c, lightning_twa.TWACallback)
                )
                optimizer = callback._run.optimization.optimizer
                self.extra = [torch.tensor(isinstance(optimizer.exchange, exchange.Shard)),
                              torch.tensor(optimizer.subspace.nbytes)]  # fmt: skip

    d = sum(p.numel() for p in Wide().parameters())
    limit = 2 * 4 * d * (3 + 1) - sharded  # twice three directions, at most, and the center

    def free(device: torch.device, processes: int) -> int | None:
        assert processes == 2
        return None if torch.distributed.get_rank() == 0 else limit

    monkeypatch.setattr("lightning_twa.phases.ranks.free_bytes", free)
    reports = fit(tmp_path, twa(), Says())
    assert [bool(r["extra"][0]) for r in reports] == [sharded] * 2
    held = 4 * d * (2 + 1)
    total = sum(int(r["extra"][1]) for r in reports)
    assert total == (held if sharded else 2 * held)


def test_buffers_are_equal_on_all_ranks_when_validated_and_saved(tmp_path) -> None:
    class Watch(L.Callback):
        """This rank's running mean at each validation of the phase."""

        def __init__(self, callback: TWACallback) -> None:
            self.twa, self.means = callback, []

        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *a: Any) -> None:
            if self.twa.phase == "optimize":
                self.means.append(pl_module.net[1].running_mean.clone())

        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            torch.save(self.means, tmp_path / f"means{trainer.global_rank}.pt")

    callback = twa()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        tmp_path,
        callback,
        Regressor(batchnorm=True),
        callbacks=(Watch(callback), saver),
        enable_checkpointing=True,
        val_check_interval=2,
    )
    first, second = (torch.load(tmp_path / f"means{r}.pt", weights_only=True) for r in range(2))
    assert len(first) == 6  # two a validation, three validations before the last
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    saved = torch.load(tmp_path / "step=18.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_mean"], first[0])


class OnOneRank(Regressor):
    """A layer with BatchNorm that one process runs only, and one that none runs."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.sometimes = torch.nn.BatchNorm1d(6, affine=False)
        self.never = torch.nn.BatchNorm1d(6, affine=False)
        self.never.running_mean += 3.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 1:
            self.sometimes(batch[0])
        return super().training_step(batch, batch_idx)


def test_statistics_are_of_the_processes_that_run_a_layer(tmp_path) -> None:
    train = strided(2)
    two = fit(tmp_path, twa(), OnOneRank(), train=train, use_distributed_sampler=False)
    assert equal(two[0]["state"], two[1]["state"])
    inputs = torch.stack([regression_data()[i][0] for i in range(1, 64, 2)]).double()
    found = two[0]["state"]["sometimes.running_mean"].double()
    torch.testing.assert_close(found, inputs.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(two[0]["state"]["never.running_mean"], torch.full((6,), 3.0))
