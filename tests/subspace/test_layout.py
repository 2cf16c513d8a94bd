"""Where tensors lie in the flat vector, and how blocks are made of them."""

from __future__ import annotations

import pytest
import torch
from reference import BF16, F32, F64

from lightning_twa.subspace import ParameterLayout, TensorSpec


def blocks_of(sizes: list[int], blocks) -> list[int]:
    tensors = {f"w{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    layout = ParameterLayout.from_tensors(tensors, blocks)
    assert layout.num_blocks == len(layout.block_names) == 1 + max(s.block for s in layout.specs)
    return [spec.block for spec in layout.specs]


def test_tensors_follow_each_other() -> None:
    tensors = {"a": torch.zeros(2, 3), "empty": torch.zeros(0), "c": torch.zeros(())}
    layout = ParameterLayout.from_tensors(tensors)
    assert layout.specs == (
        TensorSpec("a", torch.Size((2, 3)), 0, 6, 0),
        TensorSpec("empty", torch.Size((0,)), 6, 6, 0),
        TensorSpec("c", torch.Size(()), 6, 7, 0),
    )
    assert (layout.numel, layout.num_blocks, layout.block_names) == (7, 1, ("global",))


@pytest.mark.parametrize(
    ("sizes", "blocks", "expected"),
    [
        ([3, 4, 5], "global", [0, 0, 0]),
        ([3, 4, 5], "tensor", [0, 1, 2]),
        ([3, 4, 5], 1, [0, 1, 2]),
        ([3, 4, 5, 6], 7, [0, 0, 1, 1]),  # a block of exactly so many is full
        ([3, 4, 5, 6], 8, [0, 0, 0, 0]),  # the rest, too small for a block, joins the last one
        ([9, 3, 4, 5, 6, 2], 8, [0, 1, 1, 1, 2, 2]),
        ([9, 3, 5, 8, 2], 8, [0, 1, 1, 2, 2]),
        ([1, 2], 100, [0, 0]),
    ],
)
def test_blocks(sizes, blocks, expected) -> None:
    assert blocks_of(sizes, blocks) == expected


def test_blocks_have_the_names_of_their_first_and_last_tensor() -> None:
    tensors = {k: torch.zeros(2) for k in ("a", "b", "c", "d", "e")}
    by_size = ParameterLayout.from_tensors(tensors, 3)
    assert by_size.block_names == ("a .. b", "c .. e")
    assert ParameterLayout.from_tensors(tensors, 2).block_names == ("a", "b", "c", "d", "e")
    assert ParameterLayout.from_tensors(tensors, 5).block_names == ("a .. e",)
    assert ParameterLayout.from_tensors(tensors, "tensor").block_names == tuple(tensors)


@pytest.mark.parametrize(
    ("dtypes", "expected"), [((F32, BF16), F32), ((BF16,), F32), ((F32, F64, BF16), F64)]
)
def test_dtype_of_the_flat_vector(dtypes, expected) -> None:
    tensors = {str(d): torch.zeros(2, dtype=d) for d in dtypes}
    assert ParameterLayout.from_tensors(tensors).dtype == expected


def test_what_a_layout_says_of_a_candidate() -> None:
    layout = ParameterLayout.from_tensors({"a": torch.zeros(2, 3)})
    layout.check({"a": torch.ones(2, 3), "further": torch.tensor(1)}, "candidate 'x'")
    with pytest.raises(ValueError, match=r"^candidate 'x' has no tensor 'a', which the first"):
        layout.check({}, "candidate 'x'")
    with pytest.raises(ValueError, match=r"^it has 'a' with shape \(3, 2\), but .* \(2, 3\)\.$"):
        layout.check({"a": torch.ones(3, 2)}, "it")
    with pytest.raises(ValueError, match=r"^it, tensor 'a', holds 1 NaN or infinite value: "):
        layout.check({"a": torch.tensor([[1, 2, 3], [4, 5, torch.nan]])}, "it")
