"""Copies of many tensors at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from helpers.counting import count, pretended
from lightning_twa.candidates import Store, copying
from lightning_twa.candidates.copying import to_host
from lightning_twa.candidates.taking import Taking, take

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors() -> list[Tensor]:
    """Of many forms and dtypes."""
    plain = [
        torch.randn(300, 301),
        torch.randn(3, 5),
        torch.randn(()),
        torch.randn(0, 2),
        torch.randn(7),
    ]
    odd = [torch.randn(4, 6).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    odd += [torch.randn(1, 3).expand(4, 3), torch.randn(9)[::2]]
    return [t.to(dtype) for t in plain + odd for dtype in DTYPES] + [torch.arange(5)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_copies_equal_what_is_copied(dtype: torch.dtype | None) -> None:
    held = tensors()
    dtypes = [dtype or t.dtype for t in held]
    copies, _ = to_host(held, dtypes)
    expected = [t.to(wanted, copy=True) for t, wanted in zip(held, dtypes, strict=True)]
    for tensor in held:
        tensor.copy_(torch.zeros_like(tensor)) if 0 not in tensor.stride() else None
    for copy, tensor in zip(copies, expected, strict=True):
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
        assert torch.equal(copy, tensor)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [50, 70_000])
def test_what_is_not_finite_is_seen(bad: float, dtype: torch.dtype, where: int) -> None:
    held = [torch.randn(size).to(dtype) for size in (50, 70_000, where, 20)]
    assert to_host(held, [dtype] * 4, look=True)[1]
    held[2][17] = bad
    assert not to_host(held, [dtype] * 4, look=True)[1]


def test_opposite_infinities_do_not_cancel() -> None:
    held = [torch.tensor([torch.inf]), torch.tensor([-torch.inf])]
    assert not to_host(held, [torch.float32] * 2, look=True)[1]


def test_a_sum_that_overflows_is_no_error() -> None:
    net = nn.Linear(64, 64)
    with torch.no_grad():
        net.weight.fill_(torch.finfo(torch.float32).max)
    assert not Taking(net, "epoch=0", {}).wait()
    store = Store()
    store.add(net, "epoch=0")
    (candidate,) = store
    assert torch.equal(candidate.parameters["weight"], net.weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_other_weights_are_rounded_to_the_dtype_of_the_parameter(dtype: Any) -> None:
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    weights = {name: torch.randn(p.shape).double() for name, p in net.named_parameters()}
    taken = take(net, "ema(0.9)", {}, dtype=dtype, weights=weights).parameters
    assert torch.equal(taken["weight"], weights["weight"].to(dtype or torch.float32))
    assert torch.equal(taken["bias"], weights["bias"].float())
    assert taken["weight"].dtype == (dtype or torch.float32)


def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_kept() -> None:
    net, store = nn.Linear(4, 4), Store()
    with torch.no_grad():
        net.bias[1] = torch.nan
    with pytest.raises(ValueError, match="'epoch=0', tensor 'bias', holds 1 NaN"):
        store.add(net, "epoch=0")
    assert len(store) == 0


class Subclass(Tensor):
    pass


def test_tensors_of_other_kinds_are_copied_as_they_are() -> None:
    odd = torch.randn(3).as_subclass(Subclass)
    copies, finite = to_host([odd, torch.randn(2)], [torch.float32] * 2, look=True)
    assert type(copies[0]) is Subclass
    assert copies[0].data_ptr() != odd.data_ptr()
    assert finite


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("stay", [True, False])
def test_a_device_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, stay: bool, pins: bool
) -> None:
    """A pretended one: a copy for every tensor, none of which the host waits for."""
    waits: list[Any] = []
    copied: list[bool] = []
    plain = torch._foreach_copy_

    class Stream:
        def synchronize(self) -> None:
            waits.append(len(copied))

    def counted(into: Any, what: Any, non_blocking: bool = False) -> None:
        copied.append(non_blocking)
        plain(into, what, non_blocking=non_blocking)

    empty = torch.empty

    def allocate(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory and not pins:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(copying, "PLAIN", (FakeTensor,))
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "empty", allocate)
    with ExitStack() as stack:
        pretended(stack)
        held = [torch.empty(3, 4, device="cuda") for _ in range(5)]
        held += [torch.empty(300, 400, device="cuda") for _ in range(3)]
        counted_ops = count(lambda: to_host(held, [torch.float32] * 8, stay=stay))
    assert copied == [True] * 4
    assert waits == [4]
    assert len([t for t in counted_ops.transfers if "the host asks" in t]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stay", [True, False])
def test_copies_of_a_gpu_are_those_of_before_the_next_step(stay: bool) -> None:
    held = [torch.randn(1000, 1000, device="cuda") for _ in range(8)]
    expected = [t.cpu() for t in held]
    copies, finite = to_host(held, [torch.float32] * 8, look=True, stay=stay)
    for tensor in held:
        tensor.zero_()
    assert all(torch.equal(c, e) for c, e in zip(copies, expected, strict=True))
    assert finite
    assert all(copy.is_pinned() != stay for copy in copies)
