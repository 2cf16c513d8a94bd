"""How the processes of a run take one step in the subspace together.

Projection is linear, ``u . mean(g) = mean(u . g)``, so processes that hold all directions need
not exchange gradients at all: the mean of their ``k x B`` coefficient gradients does
(``Replicate``). Processes that hold the directions of their own columns
(:mod:`~lightning_twa.subspace.columns`) sum what these give (``Shard``, ``LocalShards``). The
paper's scheme (section 3.4) exchanges ``2 D`` numbers a step.

In all of them every process ends with the same coefficients and the same weights, bit by bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_twa.machine import (
    CommonError,
    gather_columns,
    rank,
    reduce_scatter_mean,
    sum_over_ranks,
    world_size,
)
from lightning_twa.subspace.columns import Columns
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.tensors import (
    copy_all,
    flat_view,
    is_accelerator,
    local_gradient,
    local_part,
    to_dense,
    widest,
)

__all__ = ["Exchange", "LocalShards", "OneProcess", "Replicate", "Shard"]

BUCKET = 1 << 24  # elements exchanged at a time, over all processes


class Exchange(Protocol):
    """Between a model's tensors and a subspace of which a process may hold a part."""

    def project(self, subspace: Subspace, parameters: Sequence[Tensor]) -> Tensor | None:
        """The gradient in the coefficients from the parameters' ``.grad``.

        Every process calls it, also one whose parameters have no gradient: it counts as zero.

        Returns:
            ``(k, B)`` where the subspace gives it; ``None`` when no process has any gradient. Where
            several share it on an accelerator, NaN then, and where a process has failed: to raise
            the error here all would have to wait for the device.
        """

    def look(self) -> None:
        """Say what could not be said in :meth:`project`; every process calls it.

        Raises:
            CommonError: On every process, when a projection has failed on one.
        """

    def expand(
        self, subspace: Subspace, coefficients: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """Write ``theta(x)`` into the parameters."""


class OneProcess:
    """A process with all columns and the gradient to use; also each of several, where gradients
    are averaged elsewhere (DDP's own exchange).
    """

    def project(self, subspace: Subspace, parameters: Sequence[Tensor]) -> Tensor | None:
        """See :meth:`Exchange.project`."""
        gradients = [parameter.grad for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            return None
        return subspace.project(gradients)

    def look(self) -> None:
        """See :meth:`Exchange.look`."""

    def expand(
        self, subspace: Subspace, coefficients: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """See :meth:`Exchange.expand`."""
        subspace.expand(coefficients, parameters)


class Replicate(OneProcess):
    """Every process holds all columns and has a gradient of its own; ``k * B + 1`` numbers a step.

    Args:
        device: Device whose backend carries the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = _Sum(device)

    def project(self, subspace: Subspace, parameters: Sequence[Tensor]) -> Tensor | None:
        """See :meth:`Exchange.project`."""
        some = any(parameter.grad is not None for parameter in parameters)
        own = super().project
        total = self._sum(lambda: own(subspace, parameters), some, subspace)
        return None if total is None else total / world_size()

    def look(self) -> None:
        """See :meth:`Exchange.look`."""
        self._sum.look()


class Shard:
    """Every process holds the model, and the directions of its own stretch of columns.

    Gradients are averaged to where their columns are held (unless they are averaged already), and
    weights gathered from there: as many numbers a step as DDP's all-reduce sends, and none of
    the length of the whole vector in memory.

    Args:
        all_columns: From :func:`~lightning_twa.subspace.columns.cut_evenly`, for all processes.
        averaged: Whether the parameters' gradients are averaged over processes already.
        device: Device whose backend carries the numbers.
        bucket: Elements exchanged at a time, over all processes.
    """

    def __init__(
        self,
        all_columns: Sequence[Columns],
        *,
        averaged: bool,
        device: torch.device,
        bucket: int = BUCKET,
    ) -> None:
        self.averaged = averaged
        self.device = device
        self._sum = _Sum(device)
        self.columns = all_columns[rank()]
        size = max(columns.local.numel for columns in all_columns)
        width = max(min(bucket // len(all_columns), size), 1)
        self._size = -(-size // width) * width
        self._buckets = [
            _Bucket(slice(start, start + width), _spans(all_columns, start, start + width))
            for start in range(0, self._size, width)
        ]
        self._shape = (len(all_columns), width)

    def project(self, subspace: Subspace, parameters: Sequence[Tensor]) -> Tensor | None:
        """See :meth:`Exchange.project`."""
        gradients = [to_dense(parameter.grad) for parameter in parameters]
        some = any(gradient is not None for gradient in gradients)
        own: list[Tensor | None]
        if self.averaged:
            own = [
                None if gradient is None else self.columns.pick(i, gradient)
                for i, gradient in enumerate(gradients)
            ]
        else:
            own = [*self._split(self._average(gradients, subspace.layout.dtype))]
        return self._sum(lambda: subspace.project(own), some, subspace)

    def look(self) -> None:
        """See :meth:`Exchange.look`."""
        self._sum.look()

    @torch.no_grad()
    def _average(self, gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """The mean over processes of the gradient in this process's columns."""
        mean = torch.empty(self._size, dtype=dtype, device=self.device)
        rows = torch.empty(self._shape, dtype=dtype, device=self.device)
        flat = [None if gradient is None else gradient.reshape(-1) for gradient in gradients]
        for bucket in self._buckets:
            rows.zero_()
            into, what = [], []
            for span in bucket.spans:
                gradient = flat[span.tensor]
                if gradient is not None:
                    into.append(rows[span.rank, span.target])
                    what.append(gradient[span.source])
            copy_all(into, what)
            reduce_scatter_mean(rows, mean[bucket.columns])
        return mean

    def _split(self, flat: Tensor) -> list[Tensor]:
        """This process's pieces of the tensors, as views of its columns."""
        return [flat[spec.start : spec.stop] for spec in self.columns.local.specs]

    @torch.no_grad()
    def expand(
        self, subspace: Subspace, coefficients: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """See :meth:`Exchange.expand`."""
        dtypes = {parameter.dtype for parameter in parameters}
        dtype = dtypes.pop() if len(dtypes) == 1 else subspace.layout.dtype
        own = torch.zeros(self._size, dtype=dtype, device=self.device)
        subspace.expand(coefficients, self._split(own))
        self.gather(own, parameters)

    @torch.no_grad()
    def gather(self, own: Tensor, tensors: Sequence[Tensor]) -> None:
        """Fill whole tensors with every process's columns of them."""
        rows = torch.empty(self._shape, dtype=own.dtype, device=self.device)
        flat = [flat_view(tensor) for tensor in tensors]
        staged: dict[int, Tensor] = {}
        for bucket in self._buckets:
            gather_columns(own[bucket.columns], rows)
            into, what = [], []
            for span in bucket.spans:
                target = flat[span.tensor]
                if target is None:  # not contiguous: filled when all of it is there
                    target = staged.setdefault(
                        span.tensor, tensors[span.tensor].new_empty(tensors[span.tensor].numel())
                    )
                into.append(target[span.source])
                what.append(rows[span.rank, span.target])
            copy_all(into, what)
        for i, values in staged.items():
            tensors[i].copy_(values.view(tensors[i].shape))


class LocalShards:
    """Every process holds its part of each tensor, of its gradient and of the directions, as FSDP2
    and tensor parallelism leave them; gradients are averaged over replicas already.

    ``k * B + 1`` numbers a step.

    Args:
        columns: From :func:`~lightning_twa.subspace.columns.held_locally`.
        device: Device whose backend carries the numbers.
    """

    def __init__(self, columns: Columns, *, device: torch.device) -> None:
        self.columns = columns
        self._sum = _Sum(device)

    def project(self, subspace: Subspace, parameters: Sequence[Tensor]) -> Tensor | None:
        """See :meth:`Exchange.project`."""
        parts = [local_gradient(parameter) for parameter in parameters]
        own = [
            part if counted else None
            for part, counted in zip(parts, self.columns.counted, strict=True)
        ]
        some = any(parameter.grad is not None for parameter in parameters)
        return self._sum(lambda: subspace.project(own), some, subspace)

    def look(self) -> None:
        """See :meth:`Exchange.look`."""
        self._sum.look()

    @torch.no_grad()
    def expand(
        self, subspace: Subspace, coefficients: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """See :meth:`Exchange.expand`."""
        subspace.expand(coefficients, [local_part(parameter) for parameter in parameters])


@dataclass(frozen=True)
class _Span:
    """A stretch of one tensor in one process's row of a bucket."""

    rank: int
    tensor: int
    source: slice  # of the flattened tensor
    target: slice  # of the row


@dataclass(frozen=True)
class _Bucket:
    """Columns that are exchanged at a time: the same stretch of every process's own."""

    columns: slice
    spans: list[_Span]


def _spans(all_columns: Sequence[Columns], start: int, stop: int) -> list[_Span]:
    """Where the tensors' elements are in a bucket."""
    return [span for r, columns in enumerate(all_columns) for span in _row(r, columns, start, stop)]


def _row(rank: int, columns: Columns, start: int, stop: int) -> Iterator[_Span]:
    assert columns.pieces is not None
    specs = columns.local.specs
    first = bisect_right(specs, start, key=lambda spec: spec.stop)
    for i in range(first, len(specs)):
        spec = specs[i]
        low, high = max(spec.start, start), min(spec.stop, stop)
        if spec.start >= stop:
            return
        if low < high:
            shift = columns.pieces[i].start - spec.start
            yield _Span(rank, i, slice(low + shift, high + shift), slice(low - start, high - start))


class _Sum:
    """The sum over processes of what each projects.

    Args:
        device: Device whose backend carries the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._failed: Tensor | None = None  # NaN since a process has failed
        self._problem: Exception | None = None  # of this one

    def __call__(
        self, project: Callable[[], Tensor | None], some: bool, subspace: Subspace
    ) -> Tensor | None:
        """The sum of what ``project`` gives; when none of them had ``some``, see
        :meth:`Exchange.project`.

        Raises:
            CommonError: On every process, when ``project`` has raised on one; on an accelerator
                :meth:`look` does.
        """
        here = subspace.center.device
        shape = (subspace.num_directions, subspace.num_blocks)
        message = torch.zeros(shape[0] * shape[1] + 1, dtype=widest(here), device=here)
        flag = message.narrow(0, shape[0] * shape[1], 1)
        try:
            found = project()
            if found is not None:
                message.narrow(0, 0, found.numel()).copy_(found.reshape(-1))
            flag.fill_(float(some))
        except Exception as error:
            self._problem = error
            message.fill_(math.nan)
        message = sum_over_ranks(message, self._device)
        flag = message.narrow(0, shape[0] * shape[1], 1)
        total = message.narrow(0, 0, shape[0] * shape[1]).view(shape)
        self._failed = flag if self._failed is None else self._failed + flag
        if not is_accelerator(here):
            self.look()
            return total if float(flag) > 0 else None
        return torch.where(flag > 0, total, math.nan)

    def look(self) -> None:
        """See :meth:`Exchange.look`."""
        failed, self._failed = self._failed, None
        problem, self._problem = self._problem, None
        if failed is not None and math.isnan(float(failed)):
            what = "another process" if problem is None else f"{type(problem).__name__}: {problem}"
            raise CommonError(f"The gradient could not be projected ({what}).") from problem
