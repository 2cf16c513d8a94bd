"""Ways to start processes, and processes that die."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from helpers.common import TESTS, Regressor, loader, trainer
from helpers.ddp import Report, fit, strided
from helpers.processes import free_port, torchrun_environment
from helpers.resume import equal, twa
from helpers.storage import files
from lightning_twa import StorageConfig, SubspaceConfig
from lightning_twa.candidates.files import read_candidate
from lightning_twa.candidates.reference import Reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
]

SCRIPT = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning as L
import torch
from helpers.common import Regressor, trainer
from helpers.ddp import Report, strided
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import StorageConfig

folder = Path(sys.argv[1])
twa = TWACallback(
    start_epoch=4, collect=CollectConfig(start=1), distribute=sys.argv[2],
    storage=StorageConfig(kind="disk"),
)
L.seed_everything(1, verbose=False)
trainer(
    folder, callbacks=[twa, Report(twa, folder)], strategy="ddp", devices=1, num_nodes=2,
    use_distributed_sampler=False,
).fit(Regressor(), strided(2), strided(2, 32, seed=1))
# With torch 2.4, a process that keeps gloo's group may abort or hang at the interpreter's exit.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


# Shards exchange more: they stay in `make test`.
@pytest.mark.long
@pytest.mark.parametrize("distribute", [pytest.param("replicate", marks=pytest.mark.long), "shard"])
def test_two_nodes_with_a_torchrun_agent_each(tmp_path, distribute) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(TESTS)))
    folder = tmp_path / "run"
    folder.mkdir()
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc-per-node=1",
                ),
                *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *(str(script), str(folder), distribute),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    outputs = [agent.communicate(timeout=100)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    two = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert equal(two[0], two[1])
    assert two[0]["phase"] == "done"
    L.seed_everything(1, verbose=False)
    the_twa = twa()
    the_trainer = trainer(tmp_path, callbacks=[the_twa, Report(the_twa, tmp_path)])
    the_trainer.fit(Regressor(), strided(1), strided(1, 32, seed=1))
    one = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for (phase, a), (other, b) in zip(one["steps"], two[0]["steps"], strict=True):
        assert phase == other
        assert float((a - b).norm() / a.norm()) < 1e-5
    # Both nodes see the same directory, so one of them writes.
    expected = [f"version_0/epoch={e}.safetensors" for e in (1, 2, 3)]
    assert files(folder / "twa_candidates") == expected


@pytest.mark.matrix(1)
@pytest.mark.filterwarnings("ignore:You are using .torch.load. with")  # torch 2.4, unpickling
@pytest.mark.parametrize(
    ("strategy", "distribute"),
    [
        ("ddp_fork", "replicate"),
        ("ddp_fork", "shard"),
        # spawned workers: test_the_main_process_of_spawned_workers_gets_the_average stays
        pytest.param("ddp_spawn", "shard", marks=pytest.mark.long),
    ],
)
def test_two_runs_with_the_same_seed_are_bitwise_equal(tmp_path, strategy, distribute) -> None:
    runs = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        L.seed_everything(3, verbose=False)
        callback = twa(distribute=distribute, subspace=SubspaceConfig(bits=4))
        runs.append(fit(folder, callback, Regressor(batchnorm=True), strategy=strategy))
    assert equal(*runs)


@pytest.mark.filterwarnings("ignore:You are using .torch.load.:FutureWarning")  # torch 2.4 itself
def test_a_callback_can_be_pickled_before_and_after_a_run(tmp_path) -> None:
    callback = twa(storage=StorageConfig(kind="disk", dirpath=str(tmp_path / "c")))
    pickle.loads(pickle.dumps(callback))
    trainer(tmp_path, callbacks=[callback]).fit(Regressor(), loader())
    again = pickle.loads(pickle.dumps(callback))
    assert again.phase == "done"
    assert torch.equal(again.averaging_weights, callback.averaging_weights)
    assert again.candidate_names == callback.candidate_names


class Dies(Regressor):
    """Its second process gets a signal in the phase, or while it takes the second candidate."""

    def __init__(self, how: signal.Signals, epoch: int) -> None:
        super().__init__()
        self.how, self.epoch = how, epoch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_rank == 1 and self.trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), self.how)
        return super().training_step(batch, batch_idx)


def _train(rank: int, port: int, folder: Path, how: signal.Signals, epoch: int, shard: str) -> None:
    torchrun_environment(rank, 2, port)
    torch.set_num_threads(1)
    strategy = DDPStrategy(timeout=timedelta(seconds=5))
    callback = twa(distribute=shard, storage=StorageConfig(kind="disk", dirpath=str(folder / "c")))
    the_trainer = trainer(folder, callbacks=[callback], strategy=strategy, devices=2)
    try:
        the_trainer.fit(Dies(how, epoch), loader(), loader(32))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        (folder / f"error{rank}.txt").write_text(text)
    os._exit(0)


MOMENTS = {"collecting": 2, "phase": 4}
# `make test` has each signal, each moment and each distribution once.
SOME = [("SIGKILL", "phase", "shard"), ("SIGSTOP", "collecting", "replicate")]
ALL = itertools.product(["SIGKILL", "SIGSTOP"], MOMENTS, ["replicate", "shard"])


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("sent", "moment", "distribute"),
    [*SOME, *(pytest.param(*m, marks=pytest.mark.long) for m in ALL if m not in SOME)],
)
def test_when_a_process_dies_the_others_fail_in_torch_s_time(
    tmp_path, sent, moment, distribute
) -> None:
    """And the candidates taken so far are there."""
    how, epoch = signal.Signals[sent], MOMENTS[moment]
    context = multiprocessing.get_context("fork")
    port = free_port()
    workers = [
        context.Process(target=_train, args=(r, port, tmp_path, how, epoch, distribute))
        for r in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        workers[0].join(60)
        assert workers[0].exitcode == 0, "the process that is left hangs"
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    text = (tmp_path / "error0.txt").read_text()
    assert text.startswith(("RuntimeError", "DistBackendError")), text
    said = ("Connection closed by peer", "Connection reset") if how is signal.SIGKILL else ()
    assert any(words in text for words in (*said, "Timed out", "timed out", "timeout")), text
    for name in [f"epoch={e}" for e in range(1, min(epoch, 4))]:
        path = tmp_path / "c" / "version_0" / f"{name}.safetensors"
        reference = Reference(name, f"version_0/{path.name}", path.stat().st_size, "")
        candidate = read_candidate(tmp_path / "c", reference, verify=False)
        assert candidate.parameters.keys() == dict(Regressor().named_parameters()).keys()
        assert all(torch.isfinite(t).all() for t in candidate.parameters.values())
