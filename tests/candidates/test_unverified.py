"""Candidates that were loaded without comparing their files are verified before they are used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import processes
from lightning_twa import StorageConfig
from lightning_twa.candidates import (
    CandidateFileError,
    Store,
    check_files,
    depends_on_values,
    mean_buffers,
    misfit_of,
    put_average,
    take_anew,
    varying,
)
from lightning_twa.candidates.keep import keep_in_files


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("count", torch.zeros(2))


def stored(root: Path, frozen: bool = False) -> tuple[Net, dict[str, Any]]:
    """A model, and what a checkpoint has of its three candidates."""
    net, store = Net(), make(root)
    net.weight.requires_grad_(not frozen)
    for i in range(3):
        with torch.no_grad():
            net.bias.fill_(float(i))
        store.add(net, f"epoch={i}")
    store.settle()
    return net, store.state_dict()


def make(root: Path) -> Store:
    return Store(StorageConfig(kind="disk"), root=root)


def loaded(root: Path, state: dict[str, Any]) -> Store:
    store = make(root)
    store.load_state_dict(state, verify=False)
    return store


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def damage(root: Path) -> None:
    flip(root / "version_0" / "epoch=1.safetensors")


USES: dict[str, Callable[[Store, Net, Path], object]] = {
    "iterating": lambda store, net, root: list(store),
    "the newest": lambda store, net, root: [*store][-1],
    "buffers": lambda store, net, root: mean_buffers(store, net),
    "an average": lambda store, net, root: put_average(net, store),
    "taken anew": lambda store, net, root: take_anew(store, net, lambda candidate: None),
    "compared": lambda store, net, root: varying(store),
    "asked for": lambda store, net, root: check_files(store),
    "a copy's": lambda store, net, root: list(copy.deepcopy(store)),
    "a pickle's": lambda store, net, root: list(pickle.loads(pickle.dumps(store))),
}


@pytest.mark.parametrize("how", USES)
def test_values_are_verified_before_they_are_used(tmp_path: Path, how: str) -> None:
    net, state = stored(tmp_path)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    USES[how](loaded(tmp_path, state), net, tmp_path)
    net.load_state_dict(before)
    damage(tmp_path)
    store = loaded(tmp_path, state)
    with pytest.raises(CandidateFileError, match=r"epoch=1\.safetensors is damaged"):
        USES[how](store, net, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with pytest.raises(CandidateFileError, match=r"epoch=1\.safetensors is damaged"):
        list(store)


def test_forms_are_there_at_once(tmp_path: Path) -> None:
    net, state = stored(tmp_path)
    damage(tmp_path)
    store = loaded(tmp_path, state)
    assert store.names == ["epoch=0", "epoch=1", "epoch=2"]
    assert [c.parameters["weight"].shape for c in store.forms] == [(2, 3)] * 3
    assert misfit_of(store, net) is None
    assert store.state_dict()["window"] == state["window"]


def test_they_go_to_files_verified(tmp_path: Path) -> None:
    """To those of a run that is to outlive its phase."""
    _, state = stored(tmp_path)
    stranger = tmp_path / "version_0" / "other.safetensors"  # or its own files would do
    stranger.write_bytes(b"")
    damage(tmp_path)
    with pytest.raises(OSError, match=r"epoch=1\.safetensors is damaged"):
        keep_in_files(loaded(tmp_path, state), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_damaged_one_is_dropped_with_the_others_verified(tmp_path: Path) -> None:
    _, state = stored(tmp_path)
    damage(tmp_path)
    store = loaded(tmp_path, state)
    with pytest.warns(UserWarning, match=r"left out: .*epoch=1\.safetensors is damaged"):
        store.drop_damaged()
    assert [float(c.parameters["bias"][0]) for c in store] == [0.0, 2.0]


def test_what_is_verified_is_what_is_used(tmp_path: Path) -> None:
    """A file that is put back before that is mapped anew."""
    _, state = stored(tmp_path)
    path = tmp_path / "version_0" / "epoch=1.safetensors"
    good = path.read_bytes()
    damage(tmp_path)
    bad = path.rename(tmp_path / "bad")
    bad.replace(path)
    store = loaded(tmp_path, state)
    path.rename(tmp_path / "bad")  # which is mapped
    path.write_bytes(good)
    assert [float(c.parameters["bias"][0]) for c in store] == [0.0, 1.0, 2.0]
    again = loaded(tmp_path, state)
    check_files(again)
    damage(tmp_path)
    assert len(list(again)) == 3, "verified once"


def test_what_is_frozen_is_verified_at_once(tmp_path: Path) -> None:
    """It is part of every candidate."""
    net, state = stored(tmp_path, frozen=True)
    store = loaded(tmp_path, state)
    assert not depends_on_values(store.forms, {"bias"})
    assert depends_on_values(store.forms, {"weight"})
    first, *others = store
    assert all(c.parameters["weight"] is first.parameters["weight"] for c in others)
    assert torch.equal(first.parameters["weight"], net.weight)
    flip(tmp_path / "version_0" / "frozen.safetensors")
    with pytest.raises(CandidateFileError, match=r"frozen\.safetensors is damaged"):
        loaded(tmp_path, state)


def _in_each_process(root: Path) -> None:
    torch.distributed.init_process_group("gloo")
    _, state = stored(root)
    rank = torch.distributed.get_rank()
    store = loaded(root, state)
    if rank == 1:  # one process alone may ask
        assert len(list(store)) == 3
    check_files(store)
    assert [float(c.parameters["bias"][0]) for c in store] == [0.0, 1.0, 2.0]
    torch.distributed.barrier()
    if rank == 0:
        damage(root)
    torch.distributed.barrier()
    store = loaded(root, state)
    if rank == 1:
        with pytest.raises(CandidateFileError, match="damaged"):
            list(store)
    with pytest.raises(CandidateFileError, match=r"epoch=1\.safetensors is damaged"):
        check_files(store)
    with pytest.warns(UserWarning, match="left out"):
        store.drop_damaged()
    assert store.names == ["epoch=0", "epoch=2"]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_verify_alike(tmp_path: Path) -> None:
    processes.run(_in_each_process, 2, tmp_path)
