"""Which columns of the flat vector a process holds, where several share a subspace.

A process holds all ``k`` directions of its own columns: with ``W`` of them memory falls by ``W``,
and the work is even whatever ``k`` is. (The paper, section 3.4, deals out rows instead, the
candidates.) Two ways to share: columns cut evenly, with every process holding the whole model
(DDP); and whatever part of each tensor a process holds anyway (FSDP2, tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_twa.subspace.directions import TILE, pad
from lightning_twa.subspace.layout import ParameterLayout, TensorSpec
from lightning_twa.subspace.tensors import local_part

__all__ = ["Columns", "cut_evenly", "held_everywhere", "held_locally"]


@dataclass(frozen=True)
class Columns:
    """The columns that one process holds.

    Args:
        whole: The layout of the whole model, the same on every process.
        local: The layout of the pieces held here, with the names and blocks of the whole.
        pieces: What is held of each flattened tensor; ``None`` where that is all that the
            candidates have.
        counted: Whether this process counts its piece of each tensor in sums over columns; of
            several processes with the same piece one does.
        everywhere: Whether every process holds everything, so that each can compute a part of it
            for all.
    """

    whole: ParameterLayout
    local: ParameterLayout
    pieces: tuple[slice, ...] | None
    counted: tuple[bool, ...]
    everywhere: bool = False

    def pick(self, tensor: int, values: Tensor) -> Tensor:
        """What is held here of one of the layout's tensors, flat; a view where possible."""
        flat = values.reshape(-1)
        return flat if self.pieces is None else flat[self.pieces[tensor]]


def held_everywhere(whole: ParameterLayout, rank: int, processes: int) -> Columns:
    """All columns, as each of several processes holds them.

    Args:
        whole: The layout of the model.
        rank: This process's rank.
        processes: Number of processes; they take turns in counting tensors.
    """
    counted = tuple(i % processes == rank for i in range(len(whole.specs)))
    return Columns(whole, whole, None, counted, everywhere=True)


def cut_evenly(whole: ParameterLayout, processes: int) -> list[Columns]:
    """Cut the flat vector into one stretch per process.

    Cuts are at whole tiles of the packed storage, so that a process's codes and scales are those
    that one process alone would hold for these columns.

    Args:
        whole: The layout to cut.
        processes: Number of processes.

    Returns:
        One for each process. Where there are fewer tiles than processes, some hold nothing.
    """
    padded = pad(whole)
    result = []
    for rank in range(processes):
        first, last = (TILE * (r * padded.num_tiles // processes) for r in (rank, rank + 1))
        pieces = []
        for spec, start in zip(whole.specs, padded.starts, strict=True):
            size = spec.stop - spec.start
            low, high = (min(max(edge - start, 0), size) for edge in (first, last))
            pieces.append(slice(low, high))
        local = _local_layout(whole, [torch.Size((piece.stop - piece.start,)) for piece in pieces])
        result.append(Columns(whole, local, tuple(pieces), (True,) * len(pieces)))
    return result


def held_locally(whole: ParameterLayout, parameters: Mapping[str, Tensor], rank: int) -> Columns:
    """The columns of the parts that this process holds of sharded tensors.

    Args:
        whole: The layout of the whole model.
        parameters: Name to parameter; a ``DTensor`` is sharded or replicated as its placements
            say, a plain tensor is the same on every process.
        rank: This process's rank.
    """
    shapes, counted = [], []
    for spec in whole.specs:
        parameter = parameters[spec.name]
        shapes.append(local_part(parameter).shape)
        counted.append(_is_first_replica(parameter, rank))
    return Columns(whole, _local_layout(whole, shapes), None, tuple(counted))


def _is_first_replica(parameter: Tensor, rank: int) -> bool:
    """Of the processes with the same part of a tensor, the one at the origin of every mesh
    dimension along which it is replicated.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return rank == 0
    coordinate = parameter.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    return coordinate is not None and all(
        place == 0 or placement.is_shard()
        for place, placement in zip(coordinate, placements, strict=True)
    )


def _local_layout(whole: ParameterLayout, shapes: list[torch.Size]) -> ParameterLayout:
    specs, start = [], 0
    for spec, shape in zip(whole.specs, shapes, strict=True):
        stop = start + shape.numel()
        specs.append(TensorSpec(spec.name, shape, start, stop, spec.block))
        start = stop
    return ParameterLayout(tuple(specs), whole.block_names, whole.dtype)
