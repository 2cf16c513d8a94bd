"""Candidates that a device, a simulated or a real one, still sends while training goes on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.resume import equal
from helpers.simulated import DEVICE, Race, Simulated, There
from helpers.storage import files
from lightning_twa import StorageConfig
from lightning_twa.candidates import (
    Candidate,
    Store,
    copying,
    drop,
    name_files,
    pending,
    taking,
)
from lightning_twa.candidates.copying import to_host
from lightning_twa.candidates.running_mean import RunningMean

STEPS = pending.STEPS
MODELS = pytest.mark.parametrize("frozen", [False, True])
KINDS = pytest.mark.parametrize("kind", ["memory", "disk"])


class Late:
    """Instead of a thread: does the work when somebody waits for it."""

    def __init__(self, work: Any) -> None:
        self.work: Any = work

    def wait(self) -> tuple[Any, Exception | None]:
        try:
            return self.work(), None
        except Exception as error:
            return None, error


@pytest.fixture(params=["late", "thread"])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    monkeypatch.setattr(copying, "PLAIN", (Tensor, nn.Parameter, There))
    if request.param == "late":
        monkeypatch.setattr(taking, "Background", Late)
    with Simulated() as simulated:
        yield simulated


late = pytest.mark.parametrize("device", ["late"], indirect=True)


class Net(nn.Module):
    """Large and small tensors, in two dtypes, and buffers."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        shapes = {"large": (300, 301), "small": (7, 3), "bias": (5,), "none": (0, 2)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape).to(DEVICE)))
        self.low = nn.Parameter(torch.randn(9, 4).to(torch.bfloat16).to(DEVICE))
        self.small.requires_grad_(not frozen)
        self.register_buffer("mean", torch.randn(5).to(DEVICE))
        self.register_buffer("count", torch.tensor(3).to(DEVICE))
        self.register_buffer("host", torch.randn(2))

    def values(self) -> dict[str, Tensor]:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {k: (t.held if isinstance(t, There) else t).detach().clone() for k, t in own.items()}


@torch.no_grad()
def step(net: Net, store: Store, times: int = 1) -> None:
    """Training goes on: whatever the device has not taken is gone."""
    for _ in range(times):
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        net.mean.add_(1.0)
        net.count.add_(1)
        net.host.add_(1.0)
        store.pending.arrive(after_steps=True)


def made(kind: str = "memory", root: Path | None = None, **config: Any) -> Store:
    return Store(StorageConfig(kind=kind, **config), root=root, device=DEVICE)


def check(candidate: Candidate, expected: dict[str, Tensor], dtype: Any = None) -> None:
    assert candidate.tensors.keys() == expected.keys()
    for name, tensor in candidate.tensors.items():
        assert type(tensor) is Tensor
        wanted = expected[name]
        if dtype is not None and name in candidate.parameters:
            wanted = wanted.to(dtype)
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name


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


@late
@KINDS
def test_nobody_waits_for_it_before_some_steps_are_done(device, tmp_path, kind) -> None:
    net, store = Net(), made(kind, tmp_path)
    store.add(net, "epoch=0")
    (entry,) = store._window
    assert device.waits == 0
    assert store.names == ["epoch=0"]
    step(net, store, STEPS - 1)
    assert entry.taking is not None
    step(net, store)
    assert entry.taking is None
    assert (entry.writing is not None or entry.files is not None) == (kind == "disk")


@late
def test_parameters_are_sent_by_a_stream_beside_that_of_training(device, monkeypatch) -> None:
    streams, make = [], torch.cuda.Stream

    def made_one(device: Any) -> Any:
        streams.append(make(device))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", made_one)
    net, store = Net(), made()
    values = net.values()
    store.add(net, "epoch=0")
    (stream,) = streams
    assert len(stream.queue) == 4, "of each dtype the small ones at once, and the large ones"
    assert device.waits == 0
    step(net, store, 2)
    (candidate,) = store
    assert not stream.queue
    check(candidate, values)


def test_without_room_on_the_device_its_own_stream_sends_them(device, monkeypatch) -> None:
    monkeypatch.setattr(copying, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: pytest.fail("no second copy fits"))
    net, store = Net(), made()
    values = net.values()
    store.add(net, "epoch=0")
    step(net, store, 2)
    check(next(iter(store)), values)


@late
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


@late
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


def test_a_sum_that_overflows_and_a_buffer_that_is_not_finite_are_no_error(device) -> None:
    net, store = Net(), made()
    with torch.no_grad():
        net.large.fill_(torch.finfo(torch.float32).max)
        net.mean.fill_(torch.nan)
    values = net.values()
    store.add(net, "epoch=0")
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
        monkeypatch.setattr(copying, "free_bytes", lambda device: 0)
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
