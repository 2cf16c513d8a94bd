"""Where each parameter tensor lies in the flat vector of ``D`` numbers, and in which block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_twa.subspace.tensors import check_finite

__all__ = ["ParameterLayout", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor in the flat vector.

    Args:
        name: Its name in the candidates.
        shape: Its shape.
        start: First column in the flat vector.
        stop: One past its last column.
        block: Index of the coefficient block it belongs to.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    block: int


@dataclass(frozen=True)
class ParameterLayout:
    """The order of the parameter tensors in one flat vector and their partition into blocks.

    Args:
        specs: The tensors, in order, without gaps.
        block_names: One name per block.
        dtype: Dtype of the flat vector and of the arithmetic: float64 if any tensor is float64,
            else float32.
    """

    specs: tuple[TensorSpec, ...]
    block_names: tuple[str, ...]
    dtype: torch.dtype

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], blocks: Literal["global", "tensor"] | int = "global"
    ) -> ParameterLayout:
        """Lay out floating-point tensors in the order of the mapping.

        Args:
            tensors: Name to tensor.
            blocks: See :class:`~lightning_twa.SubspaceConfig`.

        Raises:
            TypeError: When a tensor is not floating-point.
            ValueError: When there is no tensor with any element.
        """
        names, sizes = [], []
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise TypeError(
                    f"Tensor {name!r} has dtype {tensor.dtype}; only floating-point tensors can be "
                    f"averaged. Leave it out (the names argument says which tensors to span)."
                )
            names.append(name)
            sizes.append(tensor.numel())
        if sum(sizes) == 0:
            raise ValueError(
                "There is no parameter to average: every tensor given is empty or there is none."
            )
        block_of = _assign_blocks(sizes, blocks)
        specs, start = [], 0
        for name, size, block in zip(names, sizes, block_of, strict=True):
            specs.append(TensorSpec(name, tensors[name].shape, start, start + size, block))
            start += size
        dtype = (
            torch.float64
            if any(t.dtype == torch.float64 for t in tensors.values())
            else torch.float32
        )
        return cls(tuple(specs), _block_names(names, block_of, blocks), dtype)

    @property
    def numel(self) -> int:
        """``D``, the number of elements of the flat vector."""
        return self.specs[-1].stop

    @property
    def block_columns(self) -> list[slice]:
        """The columns of each block; it is of tensors that follow each other."""
        found = [slice(0, 0)] * self.num_blocks
        for spec in self.specs:
            start = found[spec.block].start if found[spec.block].stop else spec.start
            found[spec.block] = slice(start, spec.stop)
        return found

    @property
    def num_blocks(self) -> int:
        """``B``, the number of coefficient blocks."""
        return len(self.block_names)

    def check(self, tensors: Mapping[str, Tensor], what: str, *, finite: bool = True) -> None:
        """Check that a candidate has every tensor of the layout, in its shape, and finite.

        Args:
            tensors: Name to tensor; further names are allowed.
            what: What the tensors are, for the error (``"candidate 'epoch=3'"``).
            finite: Whether to read the values too.

        Raises:
            ValueError: Naming the candidate and the tensor that is missing, misshapen or not
                finite.
        """
        for spec in self.specs:
            if spec.name not in tensors:
                raise ValueError(
                    f"{what} has no tensor {spec.name!r}, which the first candidate has."
                )
            shape = tensors[spec.name].shape
            if shape != spec.shape:
                raise ValueError(
                    f"{what} has {spec.name!r} with shape {tuple(shape)}, "
                    f"but the first candidate has {tuple(spec.shape)}."
                )
            if finite:
                check_finite(tensors[spec.name], f"{what}, tensor {spec.name!r},")


def _assign_blocks(sizes: Sequence[int], blocks: Literal["global", "tensor"] | int) -> list[int]:
    """Block index of each tensor; a last group that is too small joins the one before it."""
    if blocks == "global":
        return [0] * len(sizes)
    if blocks == "tensor":
        return list(range(len(sizes)))
    block_of, block, filled = [], 0, 0
    for size in sizes:
        block_of.append(block)
        filled += size
        if filled >= blocks:
            block, filled = block + 1, 0
    last = max(block - 1, 0)
    return [min(b, last) for b in block_of]


def _block_names(
    names: Sequence[str], block_of: Sequence[int], blocks: Literal["global", "tensor"] | int
) -> tuple[str, ...]:
    """The tensor's name, or first and last tensor of the group."""
    if blocks == "global":
        return ("global",)
    members: dict[int, list[str]] = {}
    for name, block in zip(names, block_of, strict=True):
        members.setdefault(block, []).append(name)
    return tuple(m[0] if len(m) == 1 else f"{m[0]} .. {m[-1]}" for m in members.values())
