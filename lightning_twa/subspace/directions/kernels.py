"""Products with packed directions: plain functions of tensors, run tile by tile or compiled.

Shapes: ``N`` tiles of ``M`` groups of ``GROUP`` columns, ``k`` rows. A plane of codes of width
``w`` is ``(N, M * w / 8, k, GROUP)`` uint8, scales are ``(N, M, k)``: what both products need of
all rows for some columns lies together, where rows apart would meet in few places of a cache. An
entry is ``scale * (code - z)`` with ``z = (2**bits - 1) / 2``; ``z`` leaves the sums over columns,
so what is done per entry is shift, mask, convert, multiply, add. On CPUs, which shift no bytes,
bytes are widened to int32 before.

The compiled functions read each byte once at memory speed. The others take one tile after the other
through the cache; they need no compiler and no memory to speak of.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_twa.subspace.directions.codec import GROUP, PLANES, plane_weights

__all__ = [
    "Compiled",
    "compiled_kernels",
    "expand_at_once",
    "expand_by_tile",
    "expand_tiles",
    "project_at_once",
    "project_by_tile",
    "project_tiles",
    "warn_of_compiler",
]

COMPILES = {"cuda", "xpu"}  # where products in single operations would take thousands of them

Planes = tuple[Tensor, ...]
Kernel = Callable[[Planes, Tensor, Tensor, int], Tensor]


def project_tiles(planes: Planes, scales: Tensor, g: Tensor, bits: int) -> Tensor:
    """Each tile's part of direction times vector, ``sum_c u[j, c] g[c]``; to be compiled for CPUs.

    Args:
        planes: Packed codes.
        scales: ``(N, M, k)``.
        g: ``(N, M, GROUP)``, in the dtype to compute in.
        bits: 1 to 8.

    Returns:
        ``(N, k)``.
    """
    s = scales.to(g.dtype)
    total = _z(bits) * (s * g.sum(-1, keepdim=True)).sum(1)
    for plane, width, weight in _parts(planes, bits):
        wide = plane.to(torch.int32)
        for j, groups in _runs(plane.shape[1], width):
            sums = (_codes(wide, width, j).to(g.dtype) * g[:, groups, None]).sum(-1)
            total = total + weight * (sums * s[:, groups]).sum(1)
    return total


def expand_tiles(planes: Planes, y: Tensor, bits: int) -> Tensor:
    """Each tile's columns of coefficients times directions, ``sum_j x[j] u[j, c]``; to be compiled
    for CPUs.

    Args:
        planes: Packed codes.
        y: ``(N, M, k)``, scales times the coefficients of each tile's block, in the dtype to
            compute in. Within the kernel they would be multiplied for every few columns.
        bits: 1 to 8.

    Returns:
        ``(N, M, GROUP)``.
    """
    offset = _z(bits) * y.sum(2)
    result = None
    for plane, width, weight in _parts(planes, bits):
        wide, runs = plane.to(torch.int32), []
        for j, groups in _runs(plane.shape[1], width):
            codes = _codes(wide, width, j).to(y.dtype)
            run = weight * (codes * y[:, groups, :, None]).sum(2)
            runs.append(run + offset[:, groups, None] if result is None else run)
        part = torch.cat(runs, dim=1)
        result = part if result is None else result + part
    assert result is not None
    return result


def expand_scaled_tiles(
    planes: Planes,
    scales: Tensor,
    x: Tensor,
    bits: int,
    expand: Callable[[Planes, Tensor, int], Tensor] = expand_tiles,
) -> Tensor:
    """Of scales ``(N, M, k)`` and coefficients ``(N, k)`` what ``expand`` gives."""
    return expand(planes, scales.to(x.dtype) * x.unsqueeze(1), bits)


def project_at_once(planes: Planes, scales: Tensor, g: Tensor, bits: int) -> Tensor:
    """:func:`project_tiles` as one sum, which compiles to one kernel whatever the bits; a byte is
    read again, from a cache, for each code in it. For accelerators.
    """
    return (_entries(planes, scales, bits, g.dtype) * g.unsqueeze(2)).sum((1, 3))


def expand_at_once(planes: Planes, scales: Tensor, x: Tensor, bits: int) -> Tensor:
    """Of coefficients ``(N, k)`` what :func:`expand_tiles` gives, in the same way."""
    return (_entries(planes, scales, bits, x.dtype) * x[:, None, :, None]).sum(2)


def _entries(planes: Planes, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``(N, M, k, GROUP)`` all entries, which only exist inside of a kernel."""
    group = torch.arange(scales.shape[1], device=scales.device)
    total: Tensor | float = _z(bits)
    for plane, width, weight in _parts(planes, bits):
        stored = plane.shape[1]
        shift = (group // stored * width).to(torch.uint8)[:, None, None]
        codes = plane[:, group % stored].bitwise_right_shift(shift)
        total = codes.bitwise_and((1 << width) - 1).to(dtype) * weight + total
    assert isinstance(total, Tensor)
    return total * scales.to(dtype).unsqueeze(-1)


def project_by_tile(planes: Planes, scales: Tensor, g: Tensor, bits: int) -> Tensor:
    """:func:`project_tiles`, as matrix-vector products of one tile after the other."""
    n, _, k = scales.shape
    out = g.new_empty(n, k)
    with _one_thread():
        for i in range(n):
            s = scales[i].to(g.dtype)
            torch.mv(s.T, g[i].sum(-1), out=out[i]).mul_(_z(bits))
            for plane, width, weight in _parts(planes, bits):
                for j, groups in _runs(plane.shape[1], width):
                    rows = _scaled(plane[i], width, j, s[groups])
                    out[i].addmv_(rows, g[i, groups].reshape(-1), alpha=weight)
    return out


def expand_by_tile(planes: Planes, scales: Tensor, x: Tensor, bits: int) -> Tensor:
    """:func:`expand_at_once`, as matrix-vector products of one tile after the other."""
    n, m, _ = scales.shape
    out = x.new_empty(n, m, GROUP)
    with _one_thread():
        for i in range(n):
            s = scales[i].to(x.dtype)
            out[i] = (torch.mv(s, x[i]) * _z(bits)).unsqueeze(-1)
            for plane, width, weight in _parts(planes, bits):
                for j, groups in _runs(plane.shape[1], width):
                    rows = _scaled(plane[i], width, j, s[groups])
                    out[i, groups].view(-1).addmv_(rows.T, x[i], alpha=weight)
    return out


class Compiled:
    """A function of tensors through ``torch.compile``.

    ``fullgraph`` makes what cannot be compiled an error: uncompiled, the functions would hold every
    entry as a float. torch counts how often one code object is compiled and gives up at the eighth
    time, so each kind of call has a code object of its own, and sizes that differ from call to call
    are symbols (torch compiles anew where one of them is 1).

    Args:
        function: Of tensors, or tuples of tensors, and then integers, which are compiled in.
        symbols: Of each tensor, the dimensions that differ from call to call.
    """

    def __init__(
        self, function: Callable[..., Tensor], symbols: tuple[tuple[int, ...], ...]
    ) -> None:
        self.function = function
        self.symbols = symbols
        self._kinds: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, *args: Any) -> Tensor:
        """Call it, compiled for calls of this kind."""
        tensors = [arg if isinstance(arg, tuple) else (arg,) for arg in args[: len(self.symbols)]]
        (last,) = tensors[-1]
        for held, dimensions in zip(tensors, self.symbols, strict=True):
            for tensor in held:
                torch._dynamo.maybe_mark_dynamic(tensor, list(dimensions))
        kind: Any = (*args[len(tensors) :], *(held[0].dtype for held in tensors), last.device.type)
        if kind not in self._kinds:
            own = _own_code(self.function, len(self._kinds))
            self._kinds[kind] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._kinds[kind](*args)


def _own_code(function: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
    """The function with a code object, and the name by which torch knows it, of its own."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{number}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


@functools.cache
def compiled_kernels(accelerator: bool) -> tuple[Kernel, Kernel]:
    """Both products as :func:`project_by_tile` and :func:`expand_by_tile` give them, compiled.

    Args:
        accelerator: Whether for one, where each is one kernel.
    """
    if accelerator:
        return (
            Compiled(project_at_once, ((0, 2), (0, 2), (0,))),
            Compiled(expand_at_once, ((0, 2), (0, 2), (0, 1))),
        )
    expand = Compiled(expand_tiles, ((0, 2), (0, 2)))
    return (
        Compiled(project_tiles, ((0, 2), (0, 2), (0,))),
        functools.partial(expand_scaled_tiles, expand=expand),
    )


def warn_of_compiler(error: Exception, *, worked: bool) -> None:
    """Say that kernels could not be compiled.

    Args:
        error: What compiling, or the first call, has raised.
        worked: Whether the kernel has been called before.

    Raises:
        Exception: The error, where it is no failure of compiling.
    """
    if worked or _lacks_memory(error):
        raise error
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    warnings.warn(
        f"The kernels of the packed basis could not be compiled, so the slower tiled ones are "
        f"used: {reason}",
        stacklevel=3,
    )


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that memory is used up."""
    for _ in range(20):
        if error is None:
            return False
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _one_thread() -> Iterator[None]:
    """A tile's operations take some ten microseconds: waking threads for each gains little, and
    costs many times that where other processes (a DataLoader's workers) keep the cores busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _z(bits: int) -> float:
    """Minus the code of value zero."""
    return (1 - (1 << bits)) / 2


def _parts(planes: Planes, bits: int) -> Iterator[tuple[Tensor, int, int]]:
    """Plane, its width, and what its lowest bit counts."""
    return zip(planes, PLANES[bits], plane_weights(bits), strict=True)


def _runs(groups: int, width: int) -> Iterator[tuple[int, slice]]:
    """Position in the byte and the groups that are stored there."""
    return ((j, slice(j * groups, (j + 1) * groups)) for j in range(8 // width))


def _codes(plane: Tensor, width: int, j: int) -> Tensor:
    """The codes at one position of bytes, or of integers that hold one."""
    shifted = plane.bitwise_right_shift(width * j) if j > 0 else plane
    return shifted.bitwise_and((1 << width) - 1) if width * (j + 1) < 8 else shifted


def _scaled(plane: Tensor, width: int, j: int, scales: Tensor) -> Tensor:
    """A run of one tile, ``(k, groups * GROUP)``: scale times code."""
    codes = _codes(plane, width, j).transpose(0, 1).contiguous()
    return codes.to(scales.dtype).mul_(scales.T.unsqueeze(-1)).flatten(1)
