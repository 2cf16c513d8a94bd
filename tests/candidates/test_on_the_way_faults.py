"""What goes wrong while a device sends a candidate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.on_the_way import KINDS, LATE, Late, Net, check, made, step
from helpers.simulated import DEVICE
from helpers.storage import files
from lightning_twa import StorageConfig
from lightning_twa.candidates import (
    Store,
    copying,
    drop,
    pending,
)
from lightning_twa.candidates.changes import keep_last, take_anew
from lightning_twa.candidates.running_mean import RunningMean

STEPS = pending.STEPS
MODELS = pytest.mark.parametrize("frozen", [False, True])


@pytest.mark.parametrize("first", [0, 1, 3])
def test_without_memory_in_one_piece_the_training_s_stream_sends_the_rest(
    device, monkeypatch, first
) -> None:
    plain, calls = torch.empty, []

    def full(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "cpu")).startswith("cuda"):
            calls.append(args)
            if len(calls) > first:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return plain(*args, **kwargs)

    net, store = Net(), made()
    values = net.values()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        store.add(net, "epoch=0")
    assert len(calls) == first + 1
    step(net, store, 2)
    check(next(iter(store)), values)


def test_a_buffer_that_is_not_finite_is_not_looked_at(device, monkeypatch) -> None:
    """A causal mask, say."""
    net, store = Net(), made()
    with torch.no_grad():
        net.mean.fill_(-torch.inf)
    checked = []
    monkeypatch.setattr(pending, "_check", checked.append)
    store.add(net, "epoch=0")
    store.settle()
    assert not checked
    assert len(store) == 1


@pytest.mark.parametrize("limit", [(2, False), (5, True)])
def test_one_that_is_refused_has_pushed_none_out(device, tmp_path, limit) -> None:
    most, evenly = limit
    net = Net()
    storage = StorageConfig(kind="disk")
    store = Store(storage, most, root=tmp_path, device=DEVICE, evenly=evenly)
    for i in range(most):
        store.add(net, f"epoch={i}")
        step(net, store, STEPS)
    with torch.no_grad():
        net.bias[0] = torch.nan
    store.add(net, f"epoch={most}")
    with pytest.raises(ValueError, match=f"'epoch={most}', tensor 'bias'"):
        store.settle()
    assert store.names == [f"epoch={i}" for i in range(most)]
    assert len(files(tmp_path)) == most


def test_nobody_gets_one_that_has_not_been_looked_at(device) -> None:
    net, store = Net(), made()
    with torch.no_grad():
        net.bias[0] = torch.nan
    store.add(net, "epoch=0")
    with pytest.raises(ValueError, match="'epoch=0', tensor 'bias'"):
        list(store)


@LATE
@KINDS
def test_an_interrupt_while_it_is_waited_for_loses_nothing(
    device, tmp_path, monkeypatch, kind
) -> None:
    net, store = Net(), made(kind, tmp_path)
    values = net.values()
    store.add(net, "epoch=0")

    def interrupted(self: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Late, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.settle()
    store.pending.leave()
    check(next(iter(store)), values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@KINDS
@pytest.mark.parametrize("heard", ["steps", "next", "checkpoint", "validation", "end"])
def test_what_is_not_finite_is_named_and_not_kept(device, tmp_path, bad, kind, heard) -> None:
    net, store = Net(), made(kind, tmp_path)
    store.add(net, "epoch=0")
    with torch.no_grad():
        net.bias[1] = bad
    store.add(net, "epoch=1")
    step(net, store, STEPS - 1)
    hear = {
        "steps": lambda: step(net, store),
        "next": lambda: store.add(net, "epoch=2"),
        "checkpoint": store.state_dict,
        "validation": lambda: list(RunningMean().parameters(store)),
        "end": store.settle,
    }
    with pytest.raises(ValueError, match="'epoch=1', tensor 'bias', holds 1 NaN or infinite"):
        hear[heard]()
    assert store.names == ["epoch=0"]
    store.settle()
    assert len(files(tmp_path)) == (kind == "disk")


@pytest.mark.parametrize("leaves", [False, True])
def test_a_sum_that_overflows_and_a_buffer_that_is_not_finite_are_no_error(
    device, monkeypatch, leaves
) -> None:
    net, store = Net(), made()
    with torch.no_grad():
        net.large.fill_(torch.finfo(torch.float32).max)
        net.mean.fill_(torch.nan)
    values = net.values()
    store.add(net, "epoch=0")
    if leaves:
        monkeypatch.setattr(pending, "world_size", lambda: 2)
        store.pending.leave()
    store.settle()
    (candidate,) = store
    assert torch.equal(candidate.parameters["large"], values["large"])
    assert bool(candidate.buffers["mean"].isnan().all())


def test_a_device_that_fails_is_heard_of(device, monkeypatch) -> None:
    monkeypatch.setattr(copying, "_sum", lambda piece: 1 / 0)
    store = made()
    store.add(Net(), "epoch=0")
    with pytest.raises(ZeroDivisionError):
        store.settle()
    assert len(store) == 0


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("bad", [False, True])
@KINDS
def test_after_an_exception_nothing_is_on_its_way(
    device, tmp_path, monkeypatch, processes, bad, kind
) -> None:
    net, store = Net(), made(kind, tmp_path)
    if bad:
        with torch.no_grad():
            net.bias[0] = torch.nan
    values = net.values()
    store.add(net, "epoch=0")
    monkeypatch.setattr(pending, "world_size", lambda: processes)
    step(net, store)
    store.pending.leave()
    assert len(store) == (not bad)
    for entry in store._window:
        assert entry.is_here
        check(entry.candidate, values)
        assert (entry.files is not None) == (kind == "disk" and processes == 1)


@KINDS
def test_one_that_is_dropped_meanwhile_leaves_no_file(device, tmp_path, kind) -> None:
    net, store = Net(), made(kind, tmp_path)
    store.add(net, "epoch=0")
    drop(store, ["epoch=0"])
    store.settle()
    assert len(store) == 0
    assert store._dropped == []
    assert files(tmp_path) == []


def test_what_cannot_be_written_stays_in_memory(device, tmp_path, monkeypatch) -> None:
    net, store = Net(), made("disk", tmp_path)
    monkeypatch.setattr(
        "lightning_twa.candidates.disk.write_candidate",
        lambda *a, **k: (_ for _ in ()).throw(OSError("full")),
    )
    values = net.values()
    store.add(net, "epoch=0")
    step(net, store, STEPS)
    with pytest.warns(UserWarning, match=r"could not be written.*full"):
        store.settle()
    check(next(iter(store)), values)


@pytest.mark.parametrize("evenly", [False, True])
def test_one_that_arrives_where_the_next_is_taken_loses_neither(device, evenly) -> None:
    """The window is thinned out then, while the next one is about to come into it."""
    net = Net()
    store = Store(max_candidates=9, device=DEVICE, evenly=evenly)
    store.add(net, "epoch=0")
    step(net, store, 2)
    last = net.values()
    keep_last(store, net, "epoch=1")
    store.settle()
    assert store.names == ["epoch=0", "epoch=1"]
    check([*store][-1], last)
    store.give(net, "mean", {})
    given = []
    take_anew(store, net, lambda candidate: given.append(candidate.name))
    store.settle()
    assert given == ["mean", "epoch=0", "epoch=1"] == store.names
    assert store.given_names == ["mean"]


@pytest.mark.parametrize("evenly", [False, True])
def test_the_last_weights_come_beside_a_full_window(device, evenly) -> None:
    """And what is given too, whatever their names."""
    net = Net()
    store = Store(max_candidates=2, device=DEVICE, evenly=evenly)
    for i in range(2):
        store.add(net, f"epoch={i}")
        step(net, store, 2)
    store.settle()
    store.give(net, "mean", {})
    keep_last(store, net, "last(step=12)")
    store.settle()
    assert store.names == ["mean", "epoch=0", "epoch=1", "last(step=12)"]
