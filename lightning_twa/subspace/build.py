"""Building a subspace: the candidates are read in tiles, never all at once.

Three passes (center, Gram matrices, directions), with what processes that share the subspace sum
over each other's columns in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig, as_config
from lightning_twa.machine import all_ranks, from_rank_zero, in_common, sum_over_ranks
from lightning_twa.subspace.bases import mix
from lightning_twa.subspace.columns import Columns
from lightning_twa.subspace.directions import DenseDirections, Directions, PackedDirections
from lightning_twa.subspace.layout import ParameterLayout, TensorSpec
from lightning_twa.subspace.subspace import Subspace

__all__ = ["build_subspace"]

TILE_COLUMNS = 1 << 16  # columns of the candidates held in float64 at a time while building


def build_subspace(
    candidates: Iterable[Mapping[str, Tensor]],
    config: SubspaceConfig | None = None,
    *,
    names: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    mixing: Tensor | None = None,
    columns: Columns | None = None,
    start: Mapping[str, Tensor] | None = None,
    tick: Callable[[int], object] | None = None,
) -> Subspace:
    """Build the subspace that candidates span.

    The candidates are read tile by tile in three passes (center, Gram matrices, directions), so
    beyond candidates and result only ``n * 65536`` float64 numbers are held.

    Args:
        candidates: At least two mappings from name to tensor (state dicts), on any device.
        config: Basis, blocks and rank.
        names: The tensors to span, normally ``[name for name, _ in model.named_parameters()]``. All
            tensors of the first candidate if not given; then none may be integer, and a state
            dict's buffers would count as weights.
        device: Where center and directions are kept, unless ``config.device`` says; the first
            candidate's device by default.
        mixing: ``(B, k, n)``, the mixing of an earlier subspace of the same candidates, to have
            exactly its directions again.
        columns: What this process holds, as one of several that share the subspace, all of which
            call this at the same time; its layout says which tensors are spanned.
        start: The weights at ``x = 0`` instead of the uniform average, by name.
        tick: Called with the number of columns just done, in each of the passes.

    Returns:
        The subspace. Float64 if any tensor is float64, else float32.

    Raises:
        ValueError: With fewer than two candidates; or naming a tensor that is missing, misshapen or
            not finite.
        TypeError: When a tensor to span is not floating-point.
    """
    config = as_config("config", config, SubspaceConfig)
    members = list(candidates)
    if len(members) < 2:
        raise ValueError(f"A subspace needs at least two candidates, got {len(members)}.")
    if columns is None:
        chosen = _choose(members[0], names)
        layout = ParameterLayout.from_tensors(chosen, config.blocks)
        device = device or next(iter(chosen.values())).device
    else:
        layout = columns.whole
    held = layout if columns is None or columns.pieces is not None else columns.local
    together = nullcontext if columns is None else in_common
    carrier = torch.device(device or "cpu")
    target = torch.device(config.device) if config.device is not None else carrier
    tiles = _CandidateTiles(layout, members, columns, tick)

    origin = tiles if start is None else _CandidateTiles(layout, [start], columns, tick)
    with together():
        _check(config, held, members, start)
        center = torch.empty(tiles.layout.numel, dtype=layout.dtype, device="cpu")
        for part, _, rows in origin.tiles():
            center[part] = _mean(rows).to(layout.dtype)
    if mixing is None:
        mixing = _mixing(config, tiles, center, carrier)
    elif mixing.shape[0] != layout.num_blocks or mixing.shape[2] != len(members):
        raise ValueError(
            f"mixing has shape {tuple(mixing.shape)}, but there are {layout.num_blocks} blocks and "
            f"{len(members)} candidates."
        )
    mixing = mixing.to(device="cpu", dtype=torch.float64)
    if config.basis != "orthonormal" and not mixing.any():
        warnings.warn(
            f"The {len(members)} candidates are equal up to rounding, so there is nothing to "
            f"average. Were they copied (p.detach().clone()), and was there training in between?",
            stacklevel=2,
        )
    with together():  # memory may be short on one rank only
        center = center.to(target)
        stored = _empty_directions(config, tiles.layout, mixing.shape[1], target)
    _fill(stored, config, tiles, mixing, carrier)
    at_mean = start is None
    return Subspace(config, layout, center, stored, mixing, tiles.layout, at_mean)


def _choose(first: Mapping[str, Tensor], names: Iterable[str] | None) -> dict[str, Tensor]:
    """The tensors of the first candidate that are to be spanned."""
    if names is None:
        return dict(first)
    names = list(names)
    missing = [name for name in names if name not in first]
    if missing:
        raise ValueError(f"Candidate 0 has no tensor {missing[0]!r}, which names asks for.")
    return {name: first[name] for name in names}


def _check(
    config: SubspaceConfig,
    held: ParameterLayout,
    members: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor] | None,
) -> None:
    """Raise where a candidate or the start is not what the layout says, or not finite."""
    for i, member in enumerate(members):
        held.check(member, f"Candidate {i}")
    if start is not None:
        held.check(start, "The start")
        if config.parametrization != "free":
            raise ValueError(
                f"parametrization={config.parametrization!r} starts from the uniform average, "
                f"so it does not go with a start. Use parametrization='free'."
            )


class _CandidateTiles:
    """What this process holds of the candidates, a tile at a time.

    Args:
        whole: The layout of the whole model.
        members: The candidates.
        columns: What is held here; ``None`` for everything.
        tick: Called after each tile with its number of columns.
    """

    def __init__(
        self,
        whole: ParameterLayout,
        members: Sequence[Mapping[str, Tensor]],
        columns: Columns | None,
        tick: Callable[[int], object] | None,
    ) -> None:
        self.tick = tick
        self.layout = whole if columns is None else columns.local
        self.members = members
        self.columns = columns

    def tiles(
        self, *, centered: bool = False, counted: bool = False
    ) -> Iterator[tuple[slice, TensorSpec, Tensor]]:
        """Columns of all candidates: slice, tensor, and ``(n, columns)`` float64 on the CPU; all
        that are held here or those that sums over columns count here.

        Centered at their mean in float64, not at the stored center: its rounding would be a
        direction of its own where candidates lie close together, and is not part of the averaging
        weights.
        """
        for i, spec in enumerate(self.layout.specs):
            flat = [member[spec.name].detach().reshape(-1) for member in self.members]
            if self.columns is not None:
                if counted and not self.columns.counted[i]:
                    continue
                flat = [self.columns.pick(i, values) for values in flat]
            for start in range(spec.start, spec.stop, TILE_COLUMNS):
                stop = min(start + TILE_COLUMNS, spec.stop)
                local = slice(start - spec.start, stop - spec.start)
                parts = [values[local].cpu().double() for values in flat]
                rows = torch.stack(parts)
                if centered:
                    rows -= _mean(rows)
                yield slice(start, stop), spec, rows
                if self.tick is not None:
                    self.tick(stop - start)


def _mean(rows: Tensor) -> Tensor:
    """The mean of rows; of a column with one value everywhere that value, without rounding."""
    return torch.where((rows == rows[0]).all(dim=0), rows[0], rows.mean(dim=0))


def _mixing(
    config: SubspaceConfig, tiles: _CandidateTiles, center: Tensor, carrier: torch.device
) -> Tensor:
    """``(B, k, n)`` the mix of candidates that gives each block's directions."""
    n, num_blocks = len(tiles.members), tiles.layout.num_blocks
    gram = torch.zeros(num_blocks, n, n, dtype=torch.float64, device="cpu")
    norm2 = torch.zeros(num_blocks, dtype=torch.float64, device="cpu")
    for part, spec, rows in tiles.tiles(centered=config.basis != "orthonormal", counted=True):
        gram[spec.block] += rows @ rows.T
        norm2[spec.block] += center[part].double().square().sum()
    if tiles.columns is not None:
        gram, norm2 = sum_over_ranks(gram, carrier), sum_over_ranks(norm2, carrier)
    result = mix(config, gram, norm2)
    if tiles.columns is not None:
        # Eigenvectors of the same matrix, and how many count, may differ between machines.
        padded = torch.zeros(num_blocks, n, n, dtype=torch.float64, device="cpu")
        padded[:, : result.shape[1]] = result
        padded = from_rank_zero(padded, carrier)
        used = padded.abs().amax(dim=(0, 2)).nonzero()
        result = padded[:, : int(used.max()) + 1 if len(used) else 1].clone()
    return result


def _fill(
    stored: Directions,
    config: SubspaceConfig,
    tiles: _CandidateTiles,
    mixing: Tensor,
    carrier: torch.device,
) -> None:
    """Write the directions."""
    for part, spec, rows in tiles.tiles(centered=config.basis != "orthonormal"):
        stored.write(part, mixing[spec.block] @ rows)
    if tiles.columns is None:
        stored.close()
    else:
        stored.close(lambda squares: sum_over_ranks(squares, carrier))
        stored.prepare(lambda compiled: all_ranks(compiled, carrier))


def _empty_directions(
    config: SubspaceConfig, layout: ParameterLayout, k: int, device: torch.device
) -> Directions:
    """Room for ``k`` directions as the configuration wants them kept."""
    if config.bits <= 8:
        return PackedDirections(layout, k, config.bits, device)
    dtype = layout.dtype if config.bits == 32 else torch.bfloat16
    return DenseDirections(layout, k, dtype, device)
