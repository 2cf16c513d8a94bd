"""Single tensors: not finite, not contiguous, sparse, sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_twa.subspace import check_finite, local_part, to_shards
from lightning_twa.subspace.tensors import flat_view, to_dense


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(bad) -> None:
    tensor = torch.ones(5)
    check_finite(tensor, "it")
    tensor[2] = bad
    with pytest.raises(
        ValueError, match=r"^it holds 1 NaN or infinite value: training has diverged"
    ):
        check_finite(tensor, "it")
    tensor[3] = bad
    with pytest.raises(ValueError, match=r"^it holds 2 NaN or infinite values: "):
        check_finite(tensor, "it")


def test_a_sum_that_overflows_is_finite_and_so_is_nothing() -> None:
    check_finite(torch.full((4,), 3e38), "it")
    check_finite(torch.zeros(0), "it")


def test_a_flat_view_is_what_can_be_written_through() -> None:
    tensor = torch.zeros(2, 3)
    view = flat_view(tensor)
    assert view is not None
    view[4] = 1.0
    assert tensor[1, 1] == 1.0
    assert flat_view(tensor.t()) is None
    assert flat_view(tensor, like=torch.zeros(1)) is not None
    assert flat_view(tensor, like=torch.zeros(1, dtype=torch.float64)) is None
    assert flat_view(tensor, like=torch.zeros(1, device="meta")) is None
    assert flat_view(tensor.t(), like=torch.zeros(1)) is None


def test_sparse_gradients_become_dense_and_others_stay() -> None:
    dense = torch.eye(3)
    assert to_dense(None) is None
    assert to_dense(dense) is dense
    found = to_dense(dense.to_sparse())
    assert found is not None
    assert torch.equal(found, dense)
    assert not found.is_sparse


class Sharded:
    def __init__(self, part: Tensor) -> None:
        self.part = part

    def to_local(self) -> Tensor:
        assert not torch.is_grad_enabled(), "autograd would record it"
        return self.part


def test_the_local_part_of_a_sharded_tensor_and_of_a_plain_one() -> None:
    part = torch.zeros(2)
    assert local_part(Sharded(part)) is part  # type: ignore[arg-type]
    assert local_part(part) is part


def test_only_modules_with_gathered_parameters_are_told_to_shard_them() -> None:
    class Gathers(nn.Module):
        calls = 0

        def unshard(self) -> None:
            pytest.fail("gathers")

        def reshard(self) -> None:
            Gathers.calls += 1

    class Other(nn.Module):
        def reshard(self) -> None:
            pytest.fail("is another kind of module")

    to_shards(nn.Sequential(Gathers(), Other(), nn.Sequential(Gathers(), nn.Linear(1, 1))))
    assert Gathers.calls == 2
