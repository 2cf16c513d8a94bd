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

from lightning_twa.subspace.directions.scratch import Scratch

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


def quantize(
    values: Tensor, bits: int, scratch: Scratch | None = None, *, look: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose scale and codes of each group.

    Args:
        values: ``(..., GROUP)`` float32 or float64.
        bits: 1 to 8.
        scratch: Memory to work in, where the values are; the codes are good until it is used again.
        look: Whether to find out if all are finite, for which a device is waited for.

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
    scratch = scratch or Scratch(values.device)
    fit = _Fit(values, bits, scratch)
    if look and values.numel() and not math.isfinite(fit.widest.amax().item()):
        raise ValueError("Cannot quantize NaN or infinite values.")
    # Several starts, since the error has several minima: as if normal, unclipped, and between.
    normal = fit.rms * NORMAL_STEP[bits]
    full = fit.widest * (2 / (2**bits - 1))
    scale, gain = fit.improved(normal)
    if bits > 1:
        # Where several are exact (a group of one value) the first one is taken, whatever the
        # rounding: processes and runs whose values differ by that get the same codes.
        clearly = 1 + 8 * torch.finfo(values.dtype).eps
        for start in ((normal * full).sqrt_(), full):
            other, its_gain = fit.improved(start)
            better = its_gain > gain * clearly
            scale = torch.where(better, other, scale)
            gain = torch.where(better, its_gain, gain)
        scale, _ = fit.improved(scale)
    scale = scale.to(SCALE_DTYPE)
    return fit.codes(scale.to(values.dtype)), scale.squeeze(-1)


class _Fit:
    """Scales of groups, by their magnitudes: levels are those of ``|value|``, which has half as
    many, at ``(i + 1/2) * scale``.

    Args:
        values: ``(..., GROUP)``.
        bits: Of a code.
        scratch: Memory to work in.
    """

    def __init__(self, values: Tensor, bits: int, scratch: Scratch) -> None:
        self.values = values
        self.highest = 2 ** (bits - 1) - 1
        self.least = 4 * torch.finfo(values.dtype).tiny
        self.magnitudes, self.levels, self.work = (
            scratch.take(name, values.shape, values.dtype)
            for name in ("magnitudes", "levels", "work")
        )
        torch.abs(values, out=self.magnitudes)
        self.widest = self.magnitudes.amax(-1, keepdim=True)
        torch.mul(self.magnitudes, self._reciprocal(self.widest), out=self.work)
        shares = torch.linalg.vector_norm(self.work, dim=-1, keepdim=True)
        self.rms = self.widest * shares / GROUP**0.5  # squares of small values may be none

    def _reciprocal(self, scale: Tensor) -> Tensor:
        """0 where there is none."""
        return torch.where(scale > self.least, scale.reciprocal(), 0.0)

    def _round(self, scale: Tensor) -> None:
        """The nearest levels; the lowest one where the scale is 0."""
        torch.mul(self.magnitudes, self._reciprocal(scale), out=self.levels)
        self.levels.floor_().clamp_max_(self.highest).add_(0.5)

    def improved(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The least-squares scale ``sum(a l) / sum(l l)`` for the levels ``l`` of a scale, and the
        root of what it takes off the squares of the magnitudes ``a``, ``sum(a l) / ||l||``.
        """
        self._round(scale)
        torch.mul(self.magnitudes, self.levels, out=self.work)
        product = self.work.sum(-1, keepdim=True)
        norm = torch.linalg.vector_norm(self.levels, dim=-1, keepdim=True)
        gain = product.div_(norm)
        return gain / norm, gain

    def codes(self, scale: Tensor) -> Tensor:
        """uint8 codes of the levels nearest for a scale."""
        self._round(scale)
        torch.copysign(self.levels, self.values, out=self.work).add_(self.highest + 0.5)
        if self.highest < 64:  # many times faster than to uint8
            return self.work.to(torch.int8).view(torch.uint8)
        return self.work.to(torch.int16).to(torch.uint8)


def dequantize(
    codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Values of codes ``(..., GROUP)`` and scales ``(...)``, in ``dtype``; written to ``out`` where
    that is given.
    """
    levels = codes.to(dtype) if out is None else out.copy_(codes)
    return levels.sub_((2**bits - 1) / 2).mul_(scales.to(dtype).unsqueeze(-1))


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
