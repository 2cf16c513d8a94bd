"""Two processes on the CPU: equal on every rank, and equal to one process on the same batches."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Regressor, regression_data, weights
from helpers.ddp import fit, flat, strided, twa
from helpers.resume import equal, state
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_twa import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig, TWACallback
from lightning_twa.subspace.training import exchange

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class Wide(Regressor):
    """Four tiles of 8192 columns, so that up to three processes have columns to share."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 120), nn.Tanh(), nn.Linear(120, 240), nn.Tanh(), nn.Linear(240, 1)
        )


SAME = {
    "default": ({}, {}),
    "a block per tensor": ({"subspace": SubspaceConfig(blocks="tensor")}, {}),
    "candidates by steps": ({"collect": CollectConfig(start=2, every_n_train_steps=3)}, {}),
    "clipped by norm": ({}, {"gradient_clip_val": 0.05}),
    "accumulated gradients": ({}, {"accumulate_grad_batches": 2}),
}


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


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
@pytest.mark.parametrize("basis", BASES)
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


@pytest.mark.filterwarnings("ignore:You are using .torch.load. with")  # torch 2.4, unpickling
def test_the_main_process_of_spawned_workers_gets_the_average(tmp_path) -> None:
    """What Lightning's own tests run: workers that start from a pickled callback."""
    module = Regressor(batchnorm=True)
    the_twa = twa(solver=SolverConfig(name="adamw"), subspace=SubspaceConfig(blocks=20))
    two = fit(tmp_path, the_twa, module, strategy="ddp_spawn", max_epochs=5)
    assert equal(two[0]["state"], two[1]["state"])
    assert two[0]["phase"] == two[1]["phase"] == "done"
    assert equal(state(module), two[0]["state"])


# Every collective of torch.distributed, and which of its arguments is what this process puts in.
COLLECTIVES = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "gather": 0,
    "scatter": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "send": 0,
    "isend": 0,
    "barrier": None,
    "monitored_barrier": None,
    "all_gather_object": None,
    "gather_object": None,
    "broadcast_object_list": None,
    "scatter_object_list": None,
}


class Traffic(L.Callback):
    """Counts the elements that this rank's training steps put into collectives, by collective."""

    def __init__(self, twa: TWACallback, folder: Path) -> None:
        self.twa, self.folder = twa, folder
        self.now: dict[str, int] = {}
        self.steps: list[tuple[str, dict[str, int]]] = []

    def _count(self, name: str, argument: int | None) -> Any:
        plain = getattr(torch.distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            values = args[argument] if argument is not None else ()
            size = values.numel() if isinstance(values, Tensor) else sum(v.numel() for v in values)
            self.now[name] = self.now.get(name, 0) + size
            return plain(*args, **kwargs)

        return counted

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def count_bucket(group, bucket):  # torch refuses other annotations
            return allreduce_hook(group, bucket)  # through torch.distributed.all_reduce

        trainer.strategy.model.register_comm_hook(None, count_bucket)
        known = {name for name in COLLECTIVES if hasattr(torch.distributed, name)}
        for name in known:
            setattr(torch.distributed, name, self._count(name, COLLECTIVES[name]))

    def on_train_batch_start(self, *args: Any) -> None:
        self.now = {}

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        self.flag = trainer.strategy.model.require_backward_grad_sync

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps.append((self.twa.phase, dict(self.now)))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        after = trainer.strategy.model.require_backward_grad_sync
        torch.save((self.steps, self.flag, after), self.folder / f"traffic{trainer.global_rank}.pt")


def test_every_collective_is_counted() -> None:
    """One that torch adds must be counted too."""
    from torch.distributed import distributed_c10d

    other = {"new_group", "split_group", "P2POp", "all_gather_coalesced", "all_reduce_coalesced"}
    words = ("reduce", "gather", "broadcast", "scatter", "all_to_all", "send", "barrier")
    public = {n for n in distributed_c10d.__all__ if any(word in n.lower() for word in words)}
    classes = {n for n in public if n[0].isupper()}
    assert public - classes - other - set(COLLECTIVES) <= {
        "batch_isend_irecv",
        "send_object_list",
        "reduce_op",
    }


def traffic(folder: Path, twa: TWACallback, module: L.LightningModule, **kwargs: Any) -> Any:
    fit(folder, twa, module, callbacks=(Traffic(twa, folder),), **kwargs)
    return [torch.load(folder / f"traffic{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_a_step_of_the_phase_exchanges_k_times_b_numbers_instead_of_d(tmp_path, blocks) -> None:
    module = Regressor()
    d = sum(p.numel() for p in module.parameters())
    callback = twa(subspace=SubspaceConfig(blocks=blocks))
    for steps, flag, after in traffic(tmp_path, callback, module):
        collect = [s for phase, s in steps if phase == "collect"]
        phase = [s for phase, s in steps if phase == "optimize"]
        assert len(phase) == 7  # and the step that finished the phase
        k_times_b = 2 * (1 if blocks == "global" else 4)  # of three candidates; four tensors
        assert all(s == {"all_reduce": d} for s in collect)
        assert all(s == {"all_reduce": k_times_b + 1} for s in phase), "one says who has a gradient"
        assert flag is False
        assert after is True, "the flag is given back"


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_with_shards_averages_d_gradients_and_gathers_d_weights(tmp_path, clip) -> None:
    module = Wide()
    d = sum(p.numel() for p in module.parameters())
    callback = twa(distribute="shard", subspace=SubspaceConfig(bits=4))
    scatter, gather = (
        next(name for name in names if hasattr(torch.distributed, name))
        for names in (
            ("reduce_scatter_single", "reduce_scatter_tensor"),
            ("all_gather_single", "all_gather_into_tensor"),
        )
    )
    for steps, flag, after in traffic(tmp_path, callback, module, gradient_clip_val=clip):
        phase = [s for p, s in steps if p == "optimize"]
        assert len(phase) == 7
        row = phase[0][gather]
        assert d / 2 <= row <= 1.1 * d / 2, "the longer of the two processes' columns"
        expected = {scatter: 2 * row, "all_reduce": 2 + 1, gather: row}
        if clip is not None:  # averaged by DDP, for the norm
            expected = {"all_reduce": d + 2 + 1, gather: row}
        assert all(s == expected for s in phase)
        assert flag is (clip is not None)
        assert after is True


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


@pytest.mark.parametrize("n", [64, 61], ids=["even", "the last batches are 7 and 6 samples"])
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_local_gradients_give_the_same_run_as_averaged_ones(
    tmp_path, monkeypatch, distribute, n
) -> None:
    """Processes count alike, as in DDP, also where their last batches differ in size."""
    module, how = Wide(), {"train": strided(2, n), "use_distributed_sampler": False}
    local = fit(tmp_path / "local", twa(distribute=distribute), deepcopy(module), **how)
    monkeypatch.setattr("lightning_twa.sharing._needs_true_gradient", lambda *args: "a test asks")
    averaged = fit(tmp_path / "averaged", twa(distribute=distribute), module, **how)
    torch.testing.assert_close(
        flat(local[0]["state"]), flat(averaged[0]["state"]), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(
        local[0]["averaging_weights"], averaged[0]["averaging_weights"], rtol=1e-5, atol=1e-7
    )


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


@pytest.mark.parametrize("sharded", [False, True])
def test_auto_shards_where_memory_is_short_on_any_rank(tmp_path, monkeypatch, sharded) -> None:
    class Says(Wide):
        """Remembers how the phase is shared, as the tensors that a report can hold."""

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 5:
                optimizer = self.trainer.optimizers[0]
                self.extra = [torch.tensor(isinstance(optimizer.exchange, exchange.Shard)),
                              torch.tensor(optimizer.subspace.nbytes)]  # fmt: skip

    d = sum(p.numel() for p in Wide().parameters())
    limit = 2 * 4 * d * (3 + 1) - sharded  # twice three directions, at most, and the center

    def free(device: torch.device, processes: int) -> int | None:
        assert processes == 2
        return None if torch.distributed.get_rank() == 0 else limit

    monkeypatch.setattr("lightning_twa.sharing.free_bytes", free)
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
