"""Singular vectors of spectral normalisation, made to fit averaged weights.

``torch.nn.utils.spectral_norm`` and its parametrization keep a matrix's first singular vectors as
buffers ``u`` and ``v``, and divide the matrix by ``u^T W v``. Averages of several matrices' vectors
are shorter than 1, and belong to none of them: the norm would be taken for smaller than it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["fit_singular_vectors_", "has_singular_vectors"]

_PARAMETRIZED = re.compile(r"(.*parametrizations\.[^.]+\.)original")
_HOOKED = re.compile(r"(.*)_orig")
_STEPS = 100  # of the power iteration, at most
_CONVERGED = 1e-6  # relative change of the singular value between two of them


def has_singular_vectors(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is anything for :func:`fit_singular_vectors_` to do."""
    return any(True for _ in _normalised(tensors))


@torch.no_grad()
def fit_singular_vectors_(
    tensors: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    changed: Collection[str] | None = None,
) -> list[str]:
    """Bring the singular vectors of spectrally normalised weights to those of the weights, in
    place, by a power iteration that begins with what is there.

    Args:
        tensors: Parameters and buffers by name, as in a state dict.
        fitting: Others of the same model, whose vectors fit their weights: they show which
            dimension of a square weight ``u`` belongs to.
        changed: Names of the weights to do it for; ``None`` for all.

    Returns:
        The names of the vectors.
    """
    found: list[str] = []
    for name, u_name, v_name in _normalised(tensors):
        if changed is not None and name not in changed:
            continue
        u, v = tensors[u_name], tensors[v_name]
        wide = torch.promote_types(u.dtype, torch.float32)
        dim = _dimension(*(fitting.get(n, tensors[n]).to(wide) for n in (name, u_name, v_name)))
        if dim is None or tensors[name].numel() != u.numel() * v.numel():
            continue
        matrix = tensors[name].to(wide).movedim(dim, 0).flatten(1)
        u_new, v_new = _power_iteration(matrix, u.to(wide), v.to(wide))
        u.copy_(u_new)
        v.copy_(v_new)
        found += [u_name, v_name]
    return found


def _normalised(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """The names of weights with those of their vectors."""
    for name in tensors:
        for pattern, u, v in ((_PARAMETRIZED, "0._u", "0._v"), (_HOOKED, "_u", "_v")):
            match = pattern.fullmatch(name)
            if match is not None and {match[1] + u, match[1] + v} <= tensors.keys():
                yield name, match[1] + u, match[1] + v


def _dimension(weight: Tensor, u: Tensor, v: Tensor) -> int | None:
    """The dimension of a weight that ``u`` belongs to: where several have its length, the one with
    which the vectors fit best; ``None`` where none has, as in a part of a sharded tensor.
    """
    if weight.ndim < 2 or not weight.numel() or weight.numel() != u.numel() * v.numel():
        return None
    dims = [dim for dim, size in enumerate(weight.shape) if size == u.numel()]
    if len(dims) < 2:
        return dims[0] if dims else None
    u, v = u.to(weight.device), v.to(weight.device)
    return max(dims, key=lambda dim: abs(float(u @ (weight.movedim(dim, 0).flatten(1) @ v))))


def _power_iteration(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """First left and right singular vectors; those that are given where the matrix is zero."""
    first = u
    sigma = 0.0
    for _ in range(_STEPS):
        v_next = matrix.mT @ u
        u_next = matrix @ v_next
        if not (math.isfinite(float(u_next.norm())) and float(u_next.norm()) > 0):
            if u is first and bool(matrix.any()):  # averaged to nothing: begin anew
                u = torch.ones_like(u)
                continue
            return u, v
        v = v_next / v_next.norm()
        u_next = matrix @ v
        new = float(u_next.norm())
        u = u_next / u_next.norm()
        if abs(new - sigma) <= _CONVERGED * new:
            break
        sigma = new
    return u, v
