"""Candidates that a device, a simulated or a real one, still sends while training goes on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from helpers.on_the_way import KINDS, LATE, Net, check, made, step
from helpers.resume import equal
from helpers.simulated import DEVICE, Race, There
from helpers.storage import files
from lightning_twa import StorageConfig
from lightning_twa.candidates import (
    Store,
    copying,
    name_files,
    pending,
)
from lightning_twa.candidates.copying import to_host

STEPS = pending.STEPS
MODELS = pytest.mark.parametrize("frozen", [False, True])


@MODELS
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_candidate_is_that_of_its_moment(device, tmp_path, kind, frozen, dtype) -> None:
    net, store = Net(frozen=frozen), made(kind, tmp_path, dtype=dtype)
    expected = []
    for i in range(3):
        expected.append(net.values())
        store.add(net, f"epoch={i}")
        step(net, store, (1, STEPS, 3)[i])
    rounded = torch.bfloat16 if dtype == "bfloat16" else None
    for candidate, values in zip(store, expected, strict=True):
        if frozen and rounded is not None:  # what is frozen keeps its dtype
            assert torch.equal(candidate.parameters["small"], values["small"])
            values["small"] = values["small"].to(rounded)
            candidate.parameters["small"] = candidate.parameters["small"].to(rounded)
        check(candidate, values, rounded)
    store.settle()
    assert len(files(tmp_path)) == (0 if kind == "memory" else 3 + frozen)


@LATE
@KINDS
def test_nobody_waits_for_it_before_some_steps_are_done(device, tmp_path, kind) -> None:
    net, store = Net(), made(kind, tmp_path)
    device.waits = 0
    store.add(net, "epoch=0")
    (entry,) = store._window
    assert device.waits == 0
    assert store.names == ["epoch=0"]
    step(net, store, STEPS - 1)
    assert entry.taking is not None
    step(net, store)
    assert entry.taking is None
    assert (entry.writing is not None or entry.files is not None) == (kind == "disk")


@LATE
def test_parameters_are_sent_by_a_stream_beside_that_of_training(device, monkeypatch) -> None:
    streams, make = [], torch.cuda.Stream

    def made_one(device: Any) -> Any:
        streams.append(make(device))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", made_one)
    net, store = Net(), made()
    values = net.values()
    device.waits = 0
    store.add(net, "epoch=0")
    (stream,) = streams
    assert len(stream.queue) == 5, "small ones of a dtype at once, buffers by themselves"
    assert device.waits == 0
    step(net, store, 2)
    (candidate,) = store
    assert not stream.queue
    check(candidate, values)


def test_without_room_on_the_device_its_own_stream_sends_them(device, monkeypatch) -> None:
    """What torch has reserved counts as taken: the next step needs it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1 << 34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 33)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: pytest.fail("no second copy fits"))
    net, store = Net(), made()
    values = net.values()
    store.add(net, "epoch=0")
    step(net, store, 2)
    check(next(iter(store)), values)


@LATE
def test_what_is_frozen_costs_one_wait(device) -> None:
    net, store = Net(frozen=True), made()
    net.bias.requires_grad_(False)
    net.large.requires_grad_(False)
    for i in range(2):
        store.add(net, f"epoch={i}")
        step(net, store, 2)
    device.waits = 0
    store.pending.arrive()
    arrived = device.waits
    store.add(net, "epoch=2")
    assert device.waits == arrived + 1
    first, *_, last = store
    assert first.parameters["large"] is last.parameters["large"]


@LATE
@pytest.mark.parametrize("lacks", ["wait", "record"])
def test_the_simulation_sees_races(device, monkeypatch, lacks) -> None:
    """What :class:`HostCopies` does against them is needed."""
    if lacks == "wait":
        monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, other: None)
    else:
        monkeypatch.setattr(There, "record_stream", lambda self, stream: None)
    store = made()

    def take() -> None:
        store.add(Net(), "epoch=0")
        list(store)

    with pytest.raises(Race):
        take()


@KINDS
def test_checkpoints_have_it(device, tmp_path, kind) -> None:
    net, store = Net(), made(kind, tmp_path)
    values = net.values()
    store.add(net, "epoch=0")
    step(net, store, 2)
    state = store.state_dict()
    name_files(store, state)
    (entry,) = state["window"]
    assert ("files" in entry) == (kind == "disk")
    if kind == "memory":
        assert equal({**entry["parameters"], **entry["buffers"]}, values)
    other = made(kind, tmp_path)
    other.load_state_dict(state)
    check(next(iter(other)), values)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_it(device, way) -> None:
    net, store = Net(), made()
    values = net.values()
    store.add(net, "epoch=0")
    copied = way(store)
    step(net, copied, STEPS + 1)
    check(next(iter(copied)), values)
    check(next(iter(store)), values)


def test_a_window_of_two_keeps_the_newest(device, tmp_path) -> None:
    net = Net()
    store = Store(StorageConfig(kind="disk"), 2, root=tmp_path, device=DEVICE)
    for i in range(5):
        values = net.values()
        store.add(net, f"epoch={i}")
        step(net, store, 2)
    store.settle()
    assert store.names == ["epoch=3", "epoch=4"]
    check([*store][-1], values)
    assert len(files(tmp_path)) == 2


def test_copies_for_a_short_time_are_those_of_before(device) -> None:
    """They are waited for where they are made."""
    net = Net()
    values = net.values()
    held = [p.detach() for p in net.parameters()]
    copies, finite = to_host(held, [t.dtype for t in held], look=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert finite
    assert all(
        torch.equal(c, values[n]) for c, (n, _) in zip(copies, net.named_parameters(), strict=True)
    )


# --- a real one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_sends_the_weights_of_before_the_next_step(monkeypatch, tmp_path, room) -> None:
    if not room:
        monkeypatch.setattr(copying, "unreserved_bytes", lambda device: 0)
    net = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(8)), nn.BatchNorm1d(2000)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for kind in ("memory", "disk"):
        store = Store(StorageConfig(kind=kind), root=tmp_path, device=torch.device("cuda"))
        expected = []
        for i in range(4):
            torch.cuda.synchronize()
            expected.append({k: v.cpu() for k, v in net.state_dict().items()})
            store.add(net, f"step={i}")
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.randn(64, 2000, device="cuda")).square().mean().backward()
                optimizer.step()
                store.pending.arrive(after_steps=True)
        for candidate, values in zip(store, expected, strict=True):
            assert all(torch.equal(candidate.tensors[k], v) for k, v in values.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100)).cuda()
    store = Store(StorageConfig(kind="memory"), device=torch.device("cuda"))
    store.add(net, "step=0")
    store.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        store.add(net, "step=1")
    finally:
        torch.cuda.set_sync_debug_mode("default")
