"""Building a subspace: the candidates are read in tiles, never all at once.

Two passes (center and Gram matrices, directions), each over the cores of the machine, with what
processes that share the subspace sum over each other's columns in between. Where the mixing is
known one pass is enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig, as_config
from lightning_twa.machine import (
    all_ranks,
    from_rank_zero,
    full_precision,
    in_common,
    threads_here,
)
from lightning_twa.subspace.bases import mix
from lightning_twa.subspace.candidate_tiles import CandidateTiles
from lightning_twa.subspace.columns import Columns
from lightning_twa.subspace.directions import (
    DenseDirections,
    Directions,
    PackedDirections,
    fill,
)
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.passes import Passes
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.tensors import without_autocast

__all__ = ["build_subspace", "restore_subspace"]

# Numbers of candidates up to which products are in float64, which is as fast as one notices
SMALL = 1 << 22


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

    The candidates are read tile by tile in two passes (center and Gram matrices, directions), so
    beyond candidates and result each thread (``torch.get_num_threads()``) only holds some ``n *
    8192 * 28`` bytes. The result does not depend on the number of threads. Beyond 4 million numbers
    products are in float32, summed up in float64. What a CUDA device is to keep it builds itself,
    in float64, in 256 MiB of its memory; what it cannot do the CPU does.

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
        tick: Called with the number of columns just done, in each of the passes; with a mixing
            there is one.

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
    centered = config.basis != "orthonormal"
    large = len(members) * layout.numel > SMALL
    narrow = centered and large and layout.dtype == torch.float32
    with together():
        _check(config, held, members, start)
    tiles = CandidateTiles(layout, members, columns, centered=centered, narrow=narrow)
    # Where others build nothing, they are not asked how many threads this process may have.
    threads = torch.get_num_threads() if columns is None else threads_here()
    build = Passes(tiles, threads if large else 1, tick, carrier, target)
    with full_precision(), without_autocast(torch.device("cpu")), torch.no_grad():
        given = None if start is None else _flat(tiles, start)
        if mixing is None:
            mixing = _mixing(config, build, given, together)
        elif mixing.shape[0] != layout.num_blocks or mixing.shape[2] != len(members):
            raise ValueError(
                f"mixing has shape {tuple(mixing.shape)}, but there are {layout.num_blocks} blocks "
                f"and {len(members)} candidates."
            )
        mixing = mixing.to(device="cpu", dtype=torch.float64)
        if centered and not mixing.any():
            warnings.warn(
                f"The {len(members)} candidates are equal up to rounding, so there is nothing to "
                f"average. Were they copied (p.detach().clone()), and was there training in "
                f"between?",
                stacklevel=2,
            )
        stored, mean = build.fill(
            lambda: _empty_directions(config, tiles.layout, mixing.shape[1], target),
            mixing,
            together,
            with_mean=given is None,
        )
    with together():  # memory may be short on one rank only
        found = mean if given is None else given
        assert found is not None
        center = found.to(target)
    return Subspace(config, layout, center, stored, mixing, tiles.layout, start is None)


def restore_subspace(
    state: Mapping[str, Tensor],
    config: SubspaceConfig,
    columns: Columns,
    mixing: Tensor,
    *,
    starts_at_mean: bool,
    device: torch.device | str = "cpu",
    shares: bool = False,
) -> Subspace:
    """Make a subspace again that was built before, bit by bit, without its candidates.

    Args:
        state: Of :meth:`Subspace.state_dict`, on any device.
        config: What it was built with.
        columns: What this process holds, as then.
        mixing: ``(B, k, n)`` of the subspace.
        starts_at_mean: Whether it was built without a start of its own.
        device: Where center and directions are kept, unless ``config.device`` says. The products
            are prepared for it by all processes that share the subspace, which call this together.
        shares: Whether it may have tensors of the state, which then must not change; else it has
            copies.

    Raises:
        ValueError: Where the state is of another subspace, naming the tensor; on every process,
            whichever has it.
    """
    carrier = torch.device(device)
    target = torch.device(config.device) if config.device is not None else carrier
    with in_common(ValueError):
        stored = _empty_directions(config, columns.local, mixing.shape[1], target)
        center = torch.empty(columns.local.numel, dtype=columns.local.dtype, device=target)
        error = torch.zeros((), dtype=torch.float64, device="cpu")
        filled = fill({"center": center, "error": error}, state, shares=shares)
        center = filled["center"]
        stored.load_state_dict(state, float(filled["error"]), shares=shares)
    stored.prepare(lambda compiled: all_ranks(compiled, carrier))
    mixing = mixing.to(device="cpu", dtype=torch.float64)
    return Subspace(config, columns.whole, center, stored, mixing, columns.local, starts_at_mean)


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
        held.check(member, f"Candidate {i}", finite=False)  # that is seen where it is read
    if start is not None:
        held.check(start, "The start")
        if config.parametrization != "free":
            raise ValueError(
                f"parametrization={config.parametrization!r} starts from the uniform average, "
                f"so it does not go with a start. Use parametrization='free'."
            )


def _flat(tiles: CandidateTiles, tensors: Mapping[str, Tensor]) -> Tensor:
    """What is held here of tensors, in one vector on the CPU."""
    flat = torch.empty(tiles.layout.numel, dtype=tiles.layout.dtype, device="cpu")
    for i, spec in enumerate(tiles.layout.specs):
        values = tensors[spec.name].detach().reshape(-1)
        flat[spec.start : spec.stop] = (
            values if tiles.columns is None else tiles.columns.pick(i, values)
        )
    return flat


def _mixing(
    config: SubspaceConfig,
    build: Passes,
    given: Tensor | None,
    together: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """``(B, k, n)`` the mix of candidates that gives each block's directions."""
    gram, norm2 = build.moments(given, together)
    result = mix(config, gram, norm2)
    if not build.alone:
        # Eigenvectors of the same matrix, and how many count, may differ between machines.
        padded = torch.zeros_like(gram)
        padded[:, : result.shape[1]] = result
        padded = from_rank_zero(padded, build.carrier)
        used = padded.abs().amax(dim=(0, 2)).nonzero()
        result = padded[:, : int(used.max()) + 1 if len(used) else 1].clone()
    return result


def _empty_directions(
    config: SubspaceConfig, layout: ParameterLayout, k: int, device: torch.device
) -> Directions:
    """Room for ``k`` directions as the configuration wants them kept."""
    if config.bits <= 8:
        return PackedDirections(layout, k, config.bits, device)
    dtype = layout.dtype if config.bits == 32 else torch.bfloat16
    return DenseDirections(layout, k, dtype, device)
