"""Candidates in memory, without a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_twa.candidates import Store, mean_buffers, persistent_buffers, varying
from lightning_twa.candidates.candidate import agreed_buffers
from lightning_twa.candidates.into_model import mean_parameters
from lightning_twa.candidates.taking import take


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.b.weight.requires_grad_(False)
        self.register_buffer("third", torch.full((2,), 0.1))
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_a_candidate_is_a_copy() -> None:
    net = Net()
    candidate = take(net, "first", agreed_buffers(net))
    before = net.a.weight.detach().clone()
    with torch.no_grad():
        net.a.weight += 1
    assert torch.equal(candidate.parameters["a.weight"], before)
    assert set(candidate.buffers) == {"third", "mask", "count"} == set(persistent_buffers(net))


def test_frozen_parameters_share_memory_until_they_change() -> None:
    net, store = Net(), Store()
    store.add(net, "first")
    one = store.nbytes
    store.add(net, "second")
    frozen, rest = net.b.weight.nbytes, one - net.b.weight.nbytes
    assert store.nbytes == 2 * rest + frozen
    with torch.no_grad():
        net.b.weight += 1
    store.add(net, "third")
    first, second, third = store
    assert second.parameters["b.weight"] is first.parameters["b.weight"]
    assert not torch.equal(third.parameters["b.weight"], first.parameters["b.weight"])
    assert varying(store) == {"b.weight"}
    assert varying(store, also={"a.bias"}) == {"a.bias", "b.weight"}


def test_the_newest_are_kept() -> None:
    net, store = Net(), Store(max_candidates=2)
    for name in "abcd":
        store.add(net, name)
    assert store.names == ["c", "d"]
    again = Store(max_candidates=1)
    again.load_state_dict(store.state_dict())
    assert again.names == ["d"]


def test_means_are_exact_for_what_does_not_change() -> None:
    net, store = Net(), Store()
    for i in range(7):
        net.count.fill_(i)
        with torch.no_grad():
            net.a.bias.fill_(float(i))
        store.add(net, str(i))
    buffers = mean_buffers(store, net)
    parameters = dict(mean_parameters(store))
    assert torch.equal(buffers["third"], net.third), "0.1 * 7 / 7 in float32 is not 0.1"
    assert torch.equal(buffers["mask"], net.mask)
    assert int(buffers["count"]) == 6
    assert torch.equal(parameters["a.weight"], net.a.weight)
    assert torch.equal(parameters["a.bias"], torch.full((4,), 3.0))


def test_a_trainable_weight_that_is_not_finite_is_named() -> None:
    net = Net()
    net.a.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"Candidate 'x', tensor 'a\.bias', holds 1 NaN"):
        Store().add(net, "x")
    frozen = Net()
    frozen.b.weight.data[0, 0] = -torch.inf  # a mask kept as a parameter
    Store().add(frozen, "x")


def test_trainable_parameters_can_be_rounded() -> None:
    net = Net()
    candidate = take(net, "x", agreed_buffers(net), dtype=torch.bfloat16)
    assert torch.equal(candidate.parameters["a.weight"], net.a.weight.bfloat16())
    assert torch.equal(candidate.parameters["b.weight"], net.b.weight), "it is frozen"
    assert torch.equal(candidate.buffers["third"], net.third)
