"""A frozen parameter that changes is noticed, whichever way it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.simulated import DEVICE, Simulated
from lightning_twa.candidates import Store, unchanged
from lightning_twa.candidates.frozen import leave_out_frozen
from lightning_twa.candidates.unchanged import all_same, fingerprints, same


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a device; the sizes of what was compared all the same."""
    sizes: list[int] = []
    plain = unchanged.equal

    def counted(a: Tensor, b: Tensor) -> bool:
        sizes.append(a.numel())
        return plain(a, b)

    monkeypatch.setattr(unchanged, "HOSTS", set())
    monkeypatch.setattr(unchanged, "equal", counted)
    return sizes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(60, 50), nn.Linear(50, 2)
        self.backbone.requires_grad_(False)


def _in_place(net: Net, new: Tensor) -> None:
    with torch.no_grad():
        net.backbone.weight.copy_(new)


def _through_data(net: Net, new: Tensor) -> None:
    net.backbone.weight.data.copy_(new)


def _data_of_its_own(net: Net, new: Tensor) -> None:
    net.backbone.weight.data = new


def _set(net: Net, new: Tensor) -> None:
    with torch.no_grad():
        net.backbone.weight.set_(new)


def _numpy(net: Net, new: Tensor) -> None:
    net.backbone.weight.detach().numpy()[...] = new.numpy()


def _state_dict(net: Net, new: Tensor) -> None:
    net.load_state_dict({**net.state_dict(), "backbone.weight": new})


def _assigned(net: Net, new: Tensor) -> None:
    net.load_state_dict({**net.state_dict(), "backbone.weight": new}, assign=True)
    net.backbone.requires_grad_(False)


def _another(net: Net, new: Tensor) -> None:
    net.backbone.weight = nn.Parameter(new, requires_grad=False)


def _foreach(net: Net, new: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_copy_([net.backbone.weight], [new])


def _inference(net: Net, new: Tensor) -> None:
    with torch.inference_mode():
        net.backbone.weight.copy_(new)


def _part(net: Net, new: Tensor) -> None:
    net.backbone.weight.data[-1, -1] = new[-1, -1]


def _momentum(net: Net, new: Tensor) -> None:
    net.backbone.weight.data.mul_(0.9).add_(new, alpha=0.1)


def _optimizer(name: str, **kwargs: Any) -> Callable[[Net, Tensor], None]:
    def step(net: Net, new: Tensor) -> None:
        net.backbone.weight.grad = new
        getattr(torch.optim, name)([net.backbone.weight], lr=1e-3, **kwargs).step()
        net.backbone.weight.grad = None

    return step


WAYS = {
    "in place": _in_place,
    "through data": _through_data,
    "data of its own": _data_of_its_own,
    "set_": _set,
    "numpy": _numpy,
    "load_state_dict": _state_dict,
    "load_state_dict, assigned": _assigned,
    "another parameter": _another,
    "foreach": _foreach,
    "inference mode": _inference,
    "one element": _part,
    "momentum encoder": _momentum,
    "SGD": _optimizer("SGD"),
    "foreach Adam": _optimizer("Adam", foreach=True),
    "fused AdamW": _optimizer("AdamW", fused=True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_changed_one_is_noticed(compared: list[int], way: Any) -> None:
    net, store = Net(), Store()
    before = net.backbone.weight.detach().clone()
    store.add(net, "epoch=0")
    store.add(net, "epoch=1")
    way(net, torch.randn(50, 60))
    after = net.backbone.weight.detach().clone()
    assert not torch.equal(before, after)
    state = store.state_dict()
    leave_out_frozen(state, net)
    assert [e.get("as_in_module", []) for e in state["window"]] == [["backbone.bias"]] * 2
    assert torch.equal(state["window"][1]["parameters"]["backbone.weight"], before)
    store.add(net, "epoch=2")
    *_, last = store
    assert torch.equal(last.parameters["backbone.weight"], after)


def test_one_that_stays_is_compared_once(compared: list[int]) -> None:
    net, store = Net(), Store()
    for epoch in range(6):
        net.head.weight.data.normal_()
        store.add(net, f"epoch={epoch}")
        state = store.state_dict()
        leave_out_frozen(state, net)
        assert all(len(entry["as_in_module"]) == 2 for entry in state["window"])
    assert sorted(compared) == [50, 3000]
    tensors = {id(candidate.parameters["backbone.weight"]) for candidate in store}
    assert len(tensors) == 1


def test_a_copy_that_has_gone_is_forgotten() -> None:
    tensor = torch.randn(9)
    before = len(unchanged._found)
    old = tensor.clone()
    unchanged._found[old] = (1, 2)
    assert len(unchanged._found) == before + 1
    del old
    assert len(unchanged._found) == before


def test_a_device_is_waited_for_once_for_all_that_is_frozen() -> None:
    tensors = [torch.randn(300, 20), torch.randn(7), torch.randn(2, 2).half(), torch.tensor(3.0)]
    with Simulated() as device:
        held = [t.to(DEVICE) for t in tensors]
        assert all_same(tensors, held) == [True] * 4, "compared, and remembered"
        before = device.waits
        assert all_same(tensors, held) == [True] * 4
        assert device.waits == before + 1
        held[1].add_(1.0)
        assert all_same(tensors, held) == [True, False, True, True]
        mixed = [*held[:2], *tensors[2:]]
        assert all_same(tensors, mixed) == [True, False, True, True]
    assert all_same([], []) == []


# --- fingerprints


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    return fingerprints([tensor])[0]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a bit": lambda t: _with(t, 17, -t.flatten()[17]),
    "the last": lambda t: _with(t, -1, t.flatten()[0] + 1),
    "another bit": lambda t: _with(t, 18, -t.flatten()[18]),
    "two bits": lambda t: _with(_with(t, 17, -t.flatten()[17]), 18, -t.flatten()[18]),
    "negated": lambda t: -t,
    "twice": lambda t: t * 2,
    "rolled": lambda t: t.flatten().roll(1).view_as(t),
    "rows": lambda t: t.flip(0),
    "columns": lambda t: t.flip(1),
    "two of them": lambda t: t[:, [1, 0, *range(2, t.shape[1])]],
    "noise": lambda t: t + torch.randn_like(t) * 0.01,
    "rounding": lambda t: (
        torch.nextafter(t.float(), torch.tensor(9.0)).to(t.dtype)
        if t.dtype == torch.float32
        else t * 1.05
    ),
    "zero": torch.zeros_like,
}


def _with(tensor: Tensor, index: int, value: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 1024), (1000, 37), (3, 7), (1024, 1024), (7, 2048)])
def test_fingerprints_of_what_differs_differ(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    tensor.view(-1)[17] = 1.5
    prints = {name: fingerprint(change(tensor)) for name, change in CHANGES.items()}
    plain = prints["itself"] = fingerprint(tensor)
    firsts, seconds = zip(*prints.values(), strict=True)
    assert len({*prints.values()}) == len(prints)
    assert plain == fingerprint(tensor.clone())
    assert plain == fingerprint(tensor.t().contiguous().t()), "the same values, laid otherwise"
    if tensor.numel() >= 2**16 and dtype == torch.float32:  # either alone sees most of it
        assert len(set(firsts)) >= len(firsts) - 1, "rows may be in another order"
        assert len(set(seconds)) >= len(seconds) - 3, "so may columns"


def test_bits_count_and_not_values() -> None:
    zeros, nan = torch.zeros(5), torch.full((5,), torch.nan)
    assert fingerprint(zeros) != fingerprint(-zeros)
    assert fingerprint(nan) == fingerprint(nan.clone())
    assert fingerprint(torch.empty(0)) == (0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_fingerprint_of_the_host() -> None:
    tensor = torch.randn(777, 1234)
    assert fingerprint(tensor.cuda()) == fingerprint(tensor)
    old = tensor.clone()
    assert same(old, tensor.cuda())
    assert same(old, tensor.cuda())
    changed = copy.deepcopy(tensor)
    changed[5, 5] += 1
    assert not same(old, changed.cuda())
