"""Products with packed directions: plain functions of tensors, run tile by tile or compiled.

Shapes: ``N`` tiles of ``M`` groups of ``GROUP`` columns, ``k`` rows. A plane of codes of width
``w`` is ``(N, k, M * w / 8, GROUP)`` uint8, scales are ``(N, k, M)``. An entry is ``scale * (code -
z)`` with ``z = (2**bits - 1) / 2``; ``z`` leaves the sums over columns, so what is done per entry
is shift, mask, convert, multiply, add.

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
from lightning_twa.subspace.tensors import is_accelerator

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
    """Each tile's part of direction times vector, ``sum_c u[j, c] g[c]``; to be compiled.

    Args:
        planes: Packed codes.
        scales: ``(N, k, M)``.
        g: ``(N, M, GROUP)``, in the dtype to compute in.
        bits: 1 to 8.

    Returns:
        ``(N, k)``.
    """
    s = scales.to(g.dtype)
    total = _z(bits) * (s * g.sum(-1).unsqueeze(1)).sum(-1)
    for plane, width, weight in _parts(planes, bits):
        for j, groups in _runs(plane.shape[2], width):
            codes = _codes(plane, width, j).to(g.dtype)
            sums = (codes * g[:, None, groups]).sum(-1)
            total = total + weight * (sums * s[:, :, groups]).sum(-1)
    return total


def expand_tiles(planes: Planes, scales: Tensor, x: Tensor, bits: int) -> Tensor:
    """Each tile's columns of coefficients times directions, ``sum_j x[j] u[j, c]``; to be compiled.

    Args:
        planes: Packed codes.
        scales: ``(N, k, M)``.
        x: ``(N, k)``, the coefficients of each tile's block, in the dtype to compute in.
        bits: 1 to 8.

    Returns:
        ``(N, M, GROUP)``.
    """
    y = scales.to(x.dtype) * x.unsqueeze(-1)
    offset = _z(bits) * y.sum(1)
    result = None
    for plane, width, weight in _parts(planes, bits):
        runs = []
        for j, groups in _runs(plane.shape[2], width):
            codes = _codes(plane, width, j).to(x.dtype)
            run = weight * (codes * y[:, :, groups, None]).sum(1)
            runs.append(run + offset[:, groups, None] if result is None else run)
        part = torch.cat(runs, dim=1)
        result = part if result is None else result + part
    assert result is not None
    return result


def project_at_once(planes: Planes, scales: Tensor, g: Tensor, bits: int) -> Tensor:
    """:func:`project_tiles` as one sum, which compiles to one kernel whatever the bits; a byte is
    read again, from a cache, for each code in it. For accelerators.
    """
    return (_entries(planes, scales, bits, g.dtype) * g.unsqueeze(1)).flatten(2).sum(-1)


def expand_at_once(planes: Planes, scales: Tensor, x: Tensor, bits: int) -> Tensor:
    """:func:`expand_tiles` in the same way."""
    return (_entries(planes, scales, bits, x.dtype) * x[:, :, None, None]).sum(1)


def _entries(planes: Planes, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``(N, k, M, GROUP)`` all entries, which only exist inside of a kernel."""
    group = torch.arange(scales.shape[2], device=scales.device)
    total: Tensor | float = _z(bits)
    for plane, width, weight in _parts(planes, bits):
        stored = plane.shape[2]
        shift = (group // stored * width).to(torch.uint8).unsqueeze(-1)
        codes = plane[:, :, group % stored].bitwise_right_shift(shift)
        total = codes.bitwise_and((1 << width) - 1).to(dtype) * weight + total
    assert isinstance(total, Tensor)
    return total * scales.to(dtype).unsqueeze(-1)


def project_by_tile(planes: Planes, scales: Tensor, g: Tensor, bits: int) -> Tensor:
    """:func:`project_tiles`, as matrix-vector products of one tile after the other."""
    n, k, _ = scales.shape
    out = g.new_empty(n, k)
    with _one_thread():
        for i in range(n):
            s = scales[i].to(g.dtype)
            torch.mv(s, g[i].sum(-1), out=out[i]).mul_(_z(bits))
            for plane, width, weight in _parts(planes, bits):
                for j, groups in _runs(plane.shape[2], width):
                    rows = _scaled(plane[i], width, j, s[:, groups])
                    out[i].addmv_(rows, g[i, groups].reshape(-1), alpha=weight)
    return out


def expand_by_tile(planes: Planes, scales: Tensor, x: Tensor, bits: int) -> Tensor:
    """:func:`expand_tiles`, as matrix-vector products of one tile after the other."""
    n, _, m = scales.shape
    out = x.new_empty(n, m, GROUP)
    with _one_thread():
        for i in range(n):
            s = scales[i].to(x.dtype)
            out[i] = (torch.mv(s.T, x[i]) * _z(bits)).unsqueeze(-1)
            for plane, width, weight in _parts(planes, bits):
                for j, groups in _runs(plane.shape[2], width):
                    rows = _scaled(plane[i], width, j, s[:, groups])
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
        symbols: Of each tensor, how many of its first dimensions differ from call to call.
        elsewhere: What to compile for other devices than the CPU.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        symbols: tuple[int, ...],
        elsewhere: Callable[..., Tensor] | None = None,
    ) -> None:
        self.function = function
        self.elsewhere = elsewhere or function
        self.symbols = symbols
        self._kinds: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, *args: Any) -> Tensor:
        """Call it, compiled for calls of this kind."""
        tensors = [arg if isinstance(arg, tuple) else (arg,) for arg in args[: len(self.symbols)]]
        (last,) = tensors[-1]
        for held, count in zip(tensors, self.symbols, strict=True):
            for tensor in held:
                torch._dynamo.maybe_mark_dynamic(tensor, list(range(count)))
        kind: Any = (*args[len(tensors) :], *(held[0].dtype for held in tensors), last.device.type)
        if kind not in self._kinds:
            function = self.elsewhere if is_accelerator(last.device) else self.function
            own = _own_code(function, len(self._kinds))
            self._kinds[kind] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._kinds[kind](*args)


def _own_code(function: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
    """The function with a code object, and the name by which torch knows it, of its own."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{number}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


@functools.cache
def compiled_kernels() -> tuple[Kernel, Kernel]:
    """:func:`project_tiles` and :func:`expand_tiles`, compiled; on accelerators what is one kernel
    there.
    """
    return (
        Compiled(project_tiles, (2, 2, 1), project_at_once),
        Compiled(expand_tiles, (2, 2, 2), expand_at_once),
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
    """The codes at one position of the bytes."""
    shifted = plane.bitwise_right_shift(width * j) if j > 0 else plane
    return shifted.bitwise_and((1 << width) - 1) if width * (j + 1) < 8 else shifted


def _scaled(plane: Tensor, width: int, j: int, scales: Tensor) -> Tensor:
    """A run of one tile, ``(k, groups * GROUP)``: scale times code."""
    return _codes(plane, width, j).to(scales.dtype).mul_(scales.unsqueeze(-1)).flatten(1)
