"""Candidates in files that several processes share."""

from __future__ import annotations

import errno
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from helpers import processes
from helpers.common import Regressor, flat
from helpers.ddp import fit, strided
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from helpers.storage import files, saver, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import Candidate, disk
from lightning_twa.candidates import files as files_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.mark.matrix(2)
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("epoch", [2, 4])
def test_another_number_of_processes_goes_on(tmp_path, first, second, epoch) -> None:
    """With the same global batches, and with shards where the other had none."""
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "c"))
    module, how = Regressor(), {"use_distributed_sampler": False}
    runs = []
    for count, path in ((first, None), (second, tmp_path / "ck" / f"epoch={epoch}.ckpt")):
        the_twa = TWACallback(
            start_epoch=4,
            collect=CollectConfig(start=1),
            storage=storage,
            distribute="auto" if path is None else "shard",
        )
        runs.append(
            fit(
                tmp_path / str(count),
                the_twa,
                deepcopy(module),
                count,
                callbacks=(saver(tmp_path / "ck"),) if path is None else (),
                ckpt_path=path,
                train=strided(count),
                enable_checkpointing=path is None,
                **how,
            )
        )
    (a, *_), (b, *_) = runs
    assert b["phase"] == "done"
    torch.testing.assert_close(flat(b["state"]), flat(a["state"]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_processes_of_a_host_share_one_copy(tmp_path) -> None:
    class Writers(L.Callback):
        """How many processes have written, and whether their tensors lie in the file's pages."""

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                maps = Path("/proc/self/maps").read_text()
                torch.save(
                    (the_twa._run.store.disk._writes, "epoch=2.safetensors" in maps),
                    tmp_path / f"writer{trainer.global_rank}.pt",
                )

    the_twa = TWACallback(start_epoch=4, collect=CollectConfig(start=1))
    fit(tmp_path / "run", the_twa, Regressor(), callbacks=(Writers(),))
    found = [torch.load(tmp_path / f"writer{rank}.pt", weights_only=True) for rank in range(2)]
    assert found == [(True, True), (False, True)]
    assert files(tmp_path / "run" / "twa_candidates") == [
        f"version_0/epoch={e}.safetensors" for e in (1, 2, 3)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Candidate 'epoch=2' could not be written")
def test_when_one_process_cannot_write_all_keep_the_candidate_in_memory(
    tmp_path, monkeypatch
) -> None:
    plain = disk.write_candidate

    def full(root: Path, directory: Path, candidate: Any, **kwargs: Any) -> Any:
        if candidate.name == "epoch=2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(root, directory, candidate, **kwargs)

    module = Regressor()
    whole = fit(tmp_path / "whole", twa(tmp_path / "c"), deepcopy(module))
    monkeypatch.setattr(disk, "write_candidate", full)
    full_disk = fit(tmp_path / "full", twa(tmp_path / "d"), module)
    assert equal(whole[0], full_disk[0])
    assert equal(full_disk[0], full_disk[1])
    assert "version_0/epoch=2.safetensors" not in files(tmp_path / "d")


@pytest.mark.slow
def test_a_host_that_does_not_see_the_files_has_a_writer_of_its_own(tmp_path, monkeypatch) -> None:
    """Two processes that pretend to be two hosts with a disk each."""
    monkeypatch.setattr(disk, "_host", lambda: f"host {torch.distributed.get_rank()}")
    plain = disk.Disk.__init__

    def own_disk(self: Any, root: Path, **kwargs: Any) -> None:
        mine = root / f"disk {torch.distributed.get_rank()}"
        plain(self, mine, **kwargs)

    monkeypatch.setattr(disk.Disk, "__init__", own_disk)
    module = Regressor(batchnorm=True)
    two = fit(tmp_path / "run", twa(tmp_path / "c"), module)
    assert equal(two[0]["state"], two[1]["state"])
    first, second = tmp_path / "c" / "disk 0", tmp_path / "c" / "disk 1"
    assert files(first) == files(second) != []
    for name in files(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), "one digest for all"


@pytest.mark.slow
def test_nan_weights_on_one_process_end_all_of_them(tmp_path) -> None:
    class Bad(Regressor):
        def on_train_epoch_end(self) -> None:
            if self.trainer.current_epoch == 1 and self.trainer.global_rank == 1:
                nn.init.constant_(self.net[0].bias, torch.nan)

    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"Candidate 'epoch=\d', .*NaN"
    ):
        fit(tmp_path, twa(tmp_path / "c"), Bad())


def _write_and_read_many(folder: Path) -> None:
    """One file is damaged, one is of other processes; every process is told the same."""
    torch.distributed.init_process_group("gloo")
    of_shards = disk.Disk(folder / "shards", shards=True)
    shared = disk.Disk(folder / "shared")
    rank = torch.distributed.get_rank()
    candidates = [Candidate(f"step={i}", {"w": torch.full((9,), float(i))}, {}) for i in range(7)]
    every = {d: [d.write(lambda c=c: c)[1] for c in candidates] for d in (shared, of_shards)}
    verified: list[str] = []
    verify = disk.verify_candidate
    disk.verify_candidate = lambda root, r, piece: (verified.append(r.name), verify(root, r, piece))  # type: ignore[assignment]
    for where, many in every.items():
        if rank == 0:
            path = where.root / many[3][0].file
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        torch.distributed.barrier()
        verified.clear()
        found = where.read_all([*many, many[0] * 2 if where is shared else many[0][:1]])
        assert len(verified) == (7 if where is of_shards else 3 + (rank == 0))
        for i, candidate in enumerate(found[:7]):
            if i == 3:
                assert "step=3.safetensors is damaged: its SHA-256" in str(candidate)
            else:
                assert torch.equal(candidate.parameters["w"], candidates[i].parameters["w"])
        assert "now there are 2 with" in str(found[7])
        with pytest.raises(files_module.CandidateFileError, match=r"step=3.safetensors is damaged"):
            where.read(many[3])
        assert where.read(many[4]).name == "step=4"
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_of_a_host_check_a_file_each(tmp_path: Path) -> None:
    """Of shared files; of shards each its own."""
    processes.run(_write_and_read_many, 2, tmp_path)


def test_damaged_files_are_told_from_others(tmp_path: Path) -> None:
    where = disk.Disk(tmp_path)
    many = [
        where.write(lambda i=i: Candidate(f"epoch={i}", {"w": torch.ones(3) * i}, {}))[1]
        for i in range(5)
    ]
    (tmp_path / many[1][0].file).unlink()
    path = tmp_path / many[4][0].file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = where.read_all(many)
    assert ["is missing" in str(answer) for answer in found] == [i == 1 for i in range(5)]
    assert ["is damaged" in str(answer) for answer in found] == [i == 4 for i in range(5)]
    assert [found[i].name for i in (0, 2, 3)] == ["epoch=0", "epoch=2", "epoch=3"]
    assert isinstance(where.read_all(many, verify=False)[4], Candidate)
    assert where.read_all([]) == []
