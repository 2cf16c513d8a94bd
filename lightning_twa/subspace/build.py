"""The subspace that candidates span: center and directions, and the maps to and from coefficients.

With candidates ``w_1..w_n`` and, per block ``b`` of parameter tensors, center ``c_b = mean_i
w_i,b`` and directions ``u_1,b..u_k,b``, the weights are (Li et al., arXiv 2205.13104v4, eq. 3, with
a center)::

    theta_b(x) = c_b + sum_j x[j, b] * u[j, b]

Every basis is a mix of the candidates, ``u[j, b] = sum_i mixing[b, j, i] * a[i, b]``, where ``a_i =
w_i - c`` (``w_i`` itself for ``orthonormal``). So the averaging weights follow from the
coefficients in closed form.

Deviations from the paper: the default basis is the whitened principal directions (``pca``); the
paper's normalised candidates are ``candidates`` (v4), its Gram-Schmidt is ``orthonormal`` (ICLR
2023). Directions without extent (frozen or identical tensors) are zero instead of 0/0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig
from lightning_twa.distributed import all_ranks, from_rank_zero, sum_over_ranks
from lightning_twa.subspace.columns import Columns
from lightning_twa.subspace.directions.packed import DenseDirections, Directions, PackedDirections
from lightning_twa.subspace.layout import ParameterLayout, TensorSpec

__all__ = ["Subspace", "build_subspace"]

TILE_COLUMNS = 1 << 16  # columns of the candidates held in float64 at a time while building
EIGENVALUE_FLOOR = (
    1e-6  # of the largest: directions below it are noise (EIGENVALUE_FLOOR * variance)
)
ROUNDING = (
    4 * torch.finfo(torch.float64).eps
)  # extent below this share of the center's norm is none


class Subspace:
    """Center and directions of the candidates. Made by :func:`build_subspace`.

    Attributes:
        config: The configuration it was built with.
        layout: Names, shapes and blocks of the tensors in the flat vector of ``D`` numbers.
        local_layout: The same of the columns held here; ``layout`` unless several processes share
            the subspace.
        center: The uniform average ``c``, or the given start, flat, of the columns held here, in
            the layout's dtype.
        mixing: ``(B, k, n)`` float64 on the CPU, how each block's directions are mixed of
            candidates.
        starts_at_mean: Whether the center is the uniform average, and not other weights.
    """

    def __init__(
        self,
        config: SubspaceConfig,
        layout: ParameterLayout,
        center: Tensor,
        stored: Directions,
        mixing: Tensor,
        local_layout: ParameterLayout | None = None,
        starts_at_mean: bool = True,
    ) -> None:
        self.starts_at_mean = starts_at_mean
        self.config = config
        self.layout = layout
        self.local_layout = local_layout or layout
        self.center = center
        self.stored = stored
        self.mixing = mixing

    @property
    def num_candidates(self) -> int:
        """``n``."""
        return self.mixing.shape[2]

    @property
    def num_directions(self) -> int:
        """``k``, the largest number of directions of any block."""
        return self.mixing.shape[1]

    @property
    def num_blocks(self) -> int:
        """``B``."""
        return self.mixing.shape[0]

    @property
    def directions(self) -> Tensor:
        """``(k, D)`` the directions ``u`` as they are stored, of the columns held here, in the
        layout's dtype.

        Zero where a block has fewer than ``k``. Made anew at each call: for inspection.
        """
        return self.stored.dense()

    @property
    def nbytes(self) -> int:
        """Bytes held by center and directions."""
        return self.center.nbytes + self.stored.nbytes

    def __repr__(self) -> str:
        held = "" if self.local_layout is self.layout else f"columns={self.local_layout.numel}, "
        return (
            f"Subspace(basis={self.config.basis!r}, n={self.num_candidates}, "
            f"k={self.num_directions}, D={self.layout.numel}, {held}B={self.num_blocks}, "
            f"bits={self.config.bits}, bytes={self.nbytes}, device={str(self.center.device)!r}, "
            f"relative_error={self.stored.error:.3g})"
        )

    @torch.no_grad()
    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradient in the coefficients, ``dL/dx[j, b] = u[j, b] . g_b`` (eq. 5 of the paper).

        Args:
            gradients: One per tensor of ``local_layout``, in its order, in the tensor's shape and
                any floating-point dtype, dense or sparse; ``None`` counts as zero.

        Returns:
            ``(k, B)`` float64 on the CPU: of the columns held here, to be summed over processes
            that share the subspace.
        """
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
        return self.stored.project(dense)

    @torch.no_grad()
    def expand(self, coefficients: Tensor, out: Sequence[Tensor]) -> None:
        """Write ``theta(x)`` into tensors, without a vector of ``D`` elements in between.

        Args:
            coefficients: ``(k, B)``, any floating-point dtype and device.
            out: One per tensor of ``local_layout``, in its order and the tensor's shape; any
                floating-point dtype, to which the result is rounded.
        """
        self.stored.expand(coefficients, self.center, out)

    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """The weights ``beta`` with ``theta_b = sum_i beta[i, b] * w_i``.

        Args:
            coefficients: ``(k, B)``.

        Returns:
            ``(n, B)`` float64 on the CPU. Columns sum to 1 in the centered bases. Of a subspace
            with a start of its own, by how much the weights differ from those of the start; columns
            then sum to 0.
        """
        x = coefficients.to(device="cpu", dtype=torch.float64)
        mix = torch.einsum("bkn,kb->nb", self.mixing, x)
        if self.config.basis != "orthonormal":
            # sum_i m_i (w_i - c) with c = mean(w): the mean of m comes back through the center.
            mix = mix - mix.mean(dim=0, keepdim=True)
        return mix + 1.0 / self.num_candidates if self.starts_at_mean else mix


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
    config = config or SubspaceConfig()
    members = list(candidates)
    if len(members) < 2:
        raise ValueError(f"A subspace needs at least two candidates, got {len(members)}.")
    if columns is None:
        chosen = _choose(members[0], names)
        layout = ParameterLayout.from_tensors(chosen, config.blocks)
        device = device or next(iter(chosen.values())).device
    else:
        layout = columns.whole
    expected = layout if columns is None or columns.pieces is not None else columns.local
    for i, member in enumerate(members):
        expected.check(member, f"Candidate {i}")
    if start is not None:
        expected.check(start, "The start")
        if config.parametrization != "free":
            raise ValueError(
                f"parametrization={config.parametrization!r} starts from the uniform average, "
                f"so it does not go with a start. Use parametrization='free'."
            )
    carrier = torch.device(device or "cpu")
    target = torch.device(config.device) if config.device is not None else carrier
    pieces = _Pieces(layout, members, columns, tick)

    center = torch.empty(pieces.layout.numel, dtype=layout.dtype)
    origin = pieces if start is None else _Pieces(layout, [start], columns, tick)
    for part, _, rows in origin.tiles():
        center[part] = rows.mean(dim=0).to(layout.dtype)
    if mixing is None:
        mixing = _mixing(config, pieces, center, carrier)
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
    stored = _empty_directions(config, pieces.layout, mixing.shape[1], target)
    for part, spec, rows in pieces.tiles(centered=config.basis != "orthonormal"):
        stored.write(part, mixing[spec.block] @ rows)
    if columns is None:
        stored.close()
    else:
        stored.close(lambda squares: sum_over_ranks(squares, carrier))
        stored.prepare(lambda compiled: all_ranks(compiled, carrier))
    center, at_mean = center.to(target), start is None
    return Subspace(config, layout, center, stored, mixing, pieces.layout, at_mean)


def _choose(first: Mapping[str, Tensor], names: Iterable[str] | None) -> dict[str, Tensor]:
    """The tensors of the first candidate that are to be spanned."""
    if names is None:
        return dict(first)
    names = list(names)
    missing = [name for name in names if name not in first]
    if missing:
        raise ValueError(f"Candidate 0 has no tensor {missing[0]!r}, which names asks for.")
    return {name: first[name] for name in names}


def _empty_directions(
    config: SubspaceConfig, layout: ParameterLayout, k: int, device: torch.device
) -> Directions:
    """Room for ``k`` directions as the configuration wants them kept."""
    if config.bits <= 8:
        return PackedDirections(layout, k, config.bits, device)
    dtype = layout.dtype if config.bits == 32 else torch.bfloat16
    return DenseDirections(layout, k, dtype, device)


class _Pieces:
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
                parts = [values[local].to(device="cpu", dtype=torch.float64) for values in flat]
                rows = torch.stack(parts)
                if centered:
                    rows -= rows.mean(dim=0)
                yield slice(start, stop), spec, rows
                if self.tick is not None:
                    self.tick(stop - start)


def _mixing(
    config: SubspaceConfig, pieces: _Pieces, center: Tensor, carrier: torch.device
) -> Tensor:
    """``(B, k, n)`` the mix of candidates that gives each block's directions."""
    n, num_blocks = len(pieces.members), pieces.layout.num_blocks
    gram = torch.zeros(num_blocks, n, n, dtype=torch.float64)
    norm2 = torch.zeros(num_blocks, dtype=torch.float64)
    for part, spec, rows in pieces.tiles(centered=config.basis != "orthonormal", counted=True):
        gram[spec.block] += rows @ rows.T
        norm2[spec.block] += center[part].double().square().sum()
    if pieces.columns is not None:
        gram, norm2 = sum_over_ranks(gram, carrier), sum_over_ranks(norm2, carrier)
    result = _mix(config, gram, norm2)
    if pieces.columns is not None:
        # Eigenvectors of the same matrix, and how many count, may differ between machines.
        padded = torch.zeros(num_blocks, n, n, dtype=torch.float64)
        padded[:, : result.shape[1]] = result
        padded = from_rank_zero(padded, carrier)
        used = padded.abs().amax(dim=(0, 2)).nonzero()
        result = padded[:, : int(used.max()) + 1 if len(used) else 1].clone()
    return result


def _mix(config: SubspaceConfig, gram: Tensor, norm2: Tensor) -> Tensor:
    """``(B, k, n)`` from Gram matrices ``(B, n, n)`` and squared norms of the center ``(B,)``."""
    num_blocks, n, _ = gram.shape
    mix = {"pca": _pca, "candidates": _normalised, "orthonormal": _gram_schmidt}[config.basis]
    per_block = [mix(gram[b], float(ROUNDING**2 * norm2[b])) for b in range(num_blocks)]
    if config.rank is not None:
        per_block = [m[: config.rank] for m in per_block]
    k = max(1, max(m.shape[0] for m in per_block))
    result = torch.zeros(num_blocks, k, n, dtype=torch.float64)
    for b, m in enumerate(per_block):
        result[b, : m.shape[0]] = m
    return result


def _pca(gram: Tensor, floor: float) -> Tensor:
    """Whitened principal directions: ``p_j = v_j A / sqrt(l_j)`` times the standard deviation
    ``sqrt(l_j / n)`` of the candidates along it, which is ``v_j A / sqrt(n)``.
    """
    n = gram.shape[0]
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[0] <= floor * n:
        return gram.new_zeros(0, n)
    kept = vectors[:, values > EIGENVALUE_FLOOR * values[0]].T
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    sign = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True)).sign()
    scaled: Tensor = kept * sign / n**0.5
    return scaled


def _normalised(gram: Tensor, floor: float) -> Tensor:
    """``u_i = (w_i - c) / ||w_i - c||`` (v4, section 3.2), zero for a candidate at the center."""
    norm2 = gram.diagonal()
    scale = torch.where(norm2 > floor, norm2.clamp_min(torch.finfo(norm2.dtype).tiny).rsqrt(), 0.0)
    return torch.diag(scale)


def _gram_schmidt(gram: Tensor, floor: float) -> Tensor:
    """Gram-Schmidt of the candidates in terms of their Gram matrix; a candidate that depends on the
    ones before it (to the rounding of the Gram matrix) gives no direction.
    """
    n = gram.shape[0]
    rows: list[Tensor] = []
    for i in range(n):
        row = torch.zeros(n, dtype=gram.dtype)
        row[i] = 1.0
        for _ in range(2):  # twice is enough for orthogonality to rounding
            for other in rows:
                row = row - (other @ gram @ row) * other
        norm2 = row @ gram @ row
        if norm2 > max(1e-12 * float(gram[i, i]), floor):
            rows.append(row / norm2.sqrt())
    return torch.stack(rows) if rows else gram.new_zeros(0, n)
