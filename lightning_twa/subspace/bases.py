"""The bases: from the candidates' Gram matrix to how each direction is mixed of candidates.

Deviations from the paper (arXiv 2205.13104v4): the default basis is the whitened principal
directions (``pca``); the paper's normalised candidates are ``candidates`` (v4), its Gram-Schmidt is
``orthonormal`` (ICLR 2023). Directions without extent (frozen or identical tensors) are zero
instead of 0/0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig

__all__ = ["mix"]

EIGENVALUE_FLOOR = (
    1e-6  # of the largest: directions below it are noise (EIGENVALUE_FLOOR * variance)
)
ROUNDING = (
    4 * torch.finfo(torch.float64).eps
)  # extent below this share of the center's norm is none


def mix(config: SubspaceConfig, gram: Tensor, norm2: Tensor) -> Tensor:
    """The mix of candidates that gives each block's directions.

    Args:
        config: Basis and rank.
        gram: ``(B, n, n)`` float64 products of the candidates, centered unless the basis is
            ``orthonormal``.
        norm2: ``(B,)`` float64 squared norms of the center.

    Returns:
        ``(B, k, n)`` float64; rows of zeros where a block has fewer than ``k`` directions.
    """
    num_blocks, n, _ = gram.shape
    of_block = {"pca": _pca, "candidates": _normalised, "orthonormal": _gram_schmidt}[config.basis]
    per_block = [of_block(gram[b], float(ROUNDING**2 * norm2[b])) for b in range(num_blocks)]
    if config.rank is not None:
        per_block = [m[: config.rank] for m in per_block]
    k = max(1, max(m.shape[0] for m in per_block))
    result = gram.new_zeros(num_blocks, k, n)
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
        row = gram.new_zeros(n)
        row[i] = 1.0
        for _ in range(2):  # twice is enough for orthogonality to rounding
            for other in rows:
                row = row - (other @ gram @ row) * other
        norm2 = row @ gram @ row
        if norm2 > max(1e-12 * float(gram[i, i]), floor):
            rows.append(row / norm2.sqrt())
    return torch.stack(rows) if rows else gram.new_zeros(0, n)
