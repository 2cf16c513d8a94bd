"""FSDP2 and tensor parallelism through ``ModelParallelStrategy``, on the CPU."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch

from helpers.common import flat
from helpers.plain import CollectConfig
from helpers.resume import equal
from helpers.sharded import MARKS, Normed, Sharded, Split, Unsplit, fit
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = MARKS


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


@pytest.mark.matrix(2)
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


@pytest.mark.matrix(1)
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


def test_sequence_parallelism(tmp_path) -> None:
    """Gradients that are partial sums are summed before they are projected."""
    options = {"subspace": SubspaceConfig(blocks="tensor")}
    how = {"strategy_options": {"data_parallel_size": 1, "tensor_parallel_size": 2}}
    torch.manual_seed(8)
    module = Normed()
    first, second = fit(tmp_path / "two", deepcopy(module), 2, options, **how)
    assert equal(first["steps"], second["steps"])
    (one,) = fit(tmp_path / "one", module, 1, options)
    for (_, a), (_, b) in zip(one["steps"], first["steps"], strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5
    weights = first["averaging_weights"], one["averaging_weights"]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


FILES = {"a file a rank": True, "one file": False}
# `make test` resumes once from each kind of checkpoint, while collecting and in the phase.
SOME_RESUMED = [(1, "a file a rank"), (3, "one file")]
ALL_RESUMED = itertools.product([1, 2, 3], FILES)


@pytest.mark.matrix(1)
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


def test_a_checkpoint_of_a_finished_cycle_is_more_than_its_average(tmp_path) -> None:
    """Though its optimizer states are elsewhere: the run goes on."""
    how = {"strategy_options": {"save_distributed_checkpoint": True}, "max_epochs": 6}
    options = {"cycles": 2, "start_epoch": 2, "collect": CollectConfig(start=0)}
    saved = tmp_path / "saved"
    whole = fit(tmp_path / "whole", Sharded(), 2, options, save_to=saved, **how)
    path = saved / "epoch=2.ckpt"
    again = fit(tmp_path / "again", Sharded(), 2, options, ckpt_path=path, **how)
    for a, b in zip(whole, again, strict=True):
        assert equal(a["state"], b["state"])


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
