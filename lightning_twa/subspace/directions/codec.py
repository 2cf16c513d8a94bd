"""Codec of the low-bit basis: group-scaled uniform codes, really packed.

A row is cut into groups of :data:`GROUP` columns. A group holds ``scale`` and one code of ``bits``
bits per column::

    value = scale * (code - (2**bits - 1) / 2)          code = 0 .. 2**bits - 1

At 1 bit this is the sign times ``scale / 2``, the mean magnitude. The scale minimises the group's
squared error, so on normal data the error stays within a few percent of the Lloyd-Max quantizer at
every width, with levels that need no table. The paper's code (arXiv 2205.13104v4) spans minimum to
maximum of a whole row instead, which fails below 4 bits, and keeps a byte per code.

Groups come ``M`` at a time (a tile). Codes are stored in planes of 1, 2, 4 or 8 bits; 5 bits are a
4-bit and a 1-bit plane. A byte of a plane of width ``w`` holds the codes of ``8 / w`` groups at the
same column: groups ``i + j * M * w / 8``, ``j = 0 .. 8 / w - 1``, from the lowest bits up. So
unpacking is one shift and one mask for whole groups of contiguous columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "PLANES",
    "SCALE_DTYPE",
    "dequantize",
    "pack",
    "plane_weights",
    "quantize",
    "unpack",
]

GROUP = 128  # columns per scale, which cost 1/8 bit per entry; larger groups have larger errors
SCALE_DTYPE = torch.bfloat16  # the range of float32; the codes absorb its rounding
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
# Step of the best uniform quantizer of a standard normal (Max 1960, table II; 6..8 bits by the same
# equations).
NORMAL_STEP = {
    1: 1.596,
    2: 0.9957,
    3: 0.5860,
    4: 0.3352,
    5: 0.1881,
    6: 0.1041,
    7: 0.0569,
    8: 0.0308,
}
REFINEMENTS = 2


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose scale and codes of each group.

    Args:
        values: ``(..., GROUP)`` float32 or float64.
        bits: 1 to 8.

    Returns:
        Codes ``(..., GROUP)`` uint8 and scales ``(...)`` bfloat16. A group of zeros has scale 0 and
        stays exactly zero.

    Raises:
        ValueError: When a value is not finite, or ``bits`` or the shape is not as above.
    """
    if bits not in PLANES:
        raise ValueError(f"Invalid {bits=}. Must be 1 to 8.")
    if values.shape[-1] != GROUP:
        raise ValueError(
            f"The last dimension of values must be {GROUP}, got {tuple(values.shape)}."
        )
    if values.numel() and not math.isfinite(values.abs().amax().item()):
        raise ValueError("Cannot quantize NaN or infinite values.")
    highest = 2**bits - 1
    rms = values.square().mean(-1, keepdim=True).sqrt()
    widest = values.abs().amax(-1, keepdim=True)
    best_scale = torch.zeros_like(rms)
    best_error = torch.full_like(rms, math.inf)
    # Several starts, since the error has several minima: as if normal, unclipped, and between.
    normal, full = rms * NORMAL_STEP[bits], widest * (2 / highest)
    for scale in (normal, (normal * full).sqrt(), full):
        # codes for the scale, then the least-squares scale for the codes
        for _ in range(REFINEMENTS):
            levels = _levels(values, scale, bits)
            scale = (values * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        # As it will be stored: where several would be exact (a group of one value), its rounding
        # decides, not the rounding of the values.
        scale = scale.to(SCALE_DTYPE).to(values.dtype)
        error = (values - scale * _levels(values, scale, bits)).square().sum(-1, keepdim=True)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    codes = (_levels(values, best_scale, bits) + highest / 2).to(torch.uint8)
    return codes, best_scale.squeeze(-1).to(SCALE_DTYPE)


def _levels(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest of the levels ``code - (2**bits - 1) / 2``; the lowest positive one for scale 0."""
    highest = 2**bits - 1
    codes = torch.where(scale > 0, values / scale, 0.0).add_(highest / 2).round_()
    return codes.clamp_(0, highest).sub_(highest / 2)


def dequantize(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Values of codes ``(..., GROUP)`` and scales ``(...)``, in ``dtype``."""
    levels = codes.to(dtype).sub_((2**bits - 1) / 2)
    return levels.mul_(scales.to(dtype).unsqueeze(-1))


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Pack codes ``(..., M, GROUP)`` uint8 into planes ``(..., M * width / 8, GROUP)`` uint8."""
    planes, below = [], 0
    for width in PLANES[bits]:
        part = (codes >> below) & (2**width - 1)
        runs = part.unflatten(-2, (8 // width, -1))
        plane = torch.zeros_like(runs.select(-3, 0))
        for j in range(8 // width):
            plane |= runs.select(-3, j) << (width * j)
        planes.append(plane)
        below += width
    return tuple(planes)


def unpack(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """The inverse of :func:`pack`."""
    codes, below = None, 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        runs = [(plane >> (width * j)) & (2**width - 1) for j in range(8 // width)]
        part = torch.cat(runs, dim=-2) << below
        codes = part if codes is None else codes | part
        below += width
    assert codes is not None
    return codes


def plane_weights(bits: int) -> tuple[int, ...]:
    """What a code of each plane counts: 1 for the lowest."""
    weights, below = [], 0
    for width in PLANES[bits]:
        weights.append(2**below)
        below += width
    return tuple(weights)
