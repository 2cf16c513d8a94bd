"""Where each parameter tensor lies in the flat vector of ``D`` numbers, and in which block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_twa.subspace.directions.codec import GROUP

__all__ = ["TILE", "TILE_GROUPS", "ParameterLayout", "TensorSpec", "pad"]

TILE_GROUPS = 64  # per tile: 60 rows of 4 bits are then 240 KiB, which a core's cache holds
TILE = TILE_GROUPS * GROUP


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
    def num_blocks(self) -> int:
        """``B``, the number of coefficient blocks."""
        return len(self.block_names)

    def check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Check that a candidate has every tensor of the layout, in its shape, and finite.

        Args:
            tensors: Name to tensor; further names are allowed.
            what: What the tensors are, for the error (``"candidate 'epoch=3'"``).

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
            check_finite(tensors[spec.name], f"{what}, tensor {spec.name!r},")


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN or infinity.

    Args:
        tensor: Any floating-point tensor.
        what: How the error names it.

    Raises:
        ValueError: With the number of bad entries.
    """
    # A sum runs at memory speed, unlike isfinite; an overflow is told apart below.
    if tensor.numel() and not math.isfinite(tensor.sum().item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"{what} holds {bad} NaN or infinite value{'s' if bad > 1 else ''}: training has "
                f"diverged. Lower the learning rate, or clip gradients, before weights are "
                f"averaged."
            )


def pad(layout: ParameterLayout) -> tuple[list[int], list[slice]]:
    """Pad the flat vector: tensors start at a group, so that tensors of different magnitude never
    share a scale, and blocks start at a tile.

    Returns:
        Where each tensor starts in the padded vector, and each block's tiles.
    """
    starts: list[int] = []
    block_tiles: list[slice] = []
    position, block, first_tile = 0, 0, 0
    for spec in layout.specs:
        if spec.block != block:
            position = _round_up(position, TILE)
            block_tiles.append(slice(first_tile, position // TILE))
            first_tile, block = position // TILE, spec.block
        position = _round_up(position, GROUP)
        starts.append(position)
        position += spec.stop - spec.start
    block_tiles.append(slice(first_tile, _round_up(position, TILE) // TILE))
    return starts, block_tiles


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
