"""The uniform average of candidates, without reading all of them each time."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_twa.candidates.entry import Entry
from lightning_twa.candidates.pending import SMALL
from lightning_twa.candidates.store import Store
from lightning_twa.machine import free_bytes
from lightning_twa.subspace import in_float64

__all__ = ["RunningMean"]


class RunningMean:
    """Keeps ``sum_i (w_i - w_0)`` in float64 over all candidates but the newest, which may be
    replaced: a mean then reads those that have come since. Where another one has left the window
    the sum begins anew. The means are bit for bit those of
    :func:`~lightning_twa.candidates.into_model.mean_parameters`.
    """

    def __init__(self) -> None:
        self._summed: list[weakref.ref[Entry]] = []
        self._totals: dict[str, Tensor] = {}

    def __reduce__(self) -> Any:
        return RunningMean, ()  # a copy begins anew

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        return sum(total.nbytes for total in self._totals.values())

    def clear(self) -> None:
        """Free the memory."""
        self._summed, self._totals = [], {}

    def parameters(
        self, store: Store, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The mean of each parameter, one after another: float64, or, where candidates share one
        tensor, that tensor. Every process calls it.

        Args:
            store: Of one candidate at least.
            only: Names of those that are averaged; ``None`` for all.
        """
        store.pending.arrive()
        entries = store._entries
        fixed, newest = entries[:-1], entries[-1].candidate.parameters
        known = [reference() for reference in self._summed]
        if not known or len(known) > len(fixed) or any(map(_differ, known, fixed)):
            self.clear()
            known = []
        self._summed = []  # until all totals are
        keeps = bool(known) or _has_room(newest)
        for name, last in newest.items():
            if only is not None and name not in only:
                continue
            values = [entry.candidate.parameters[name] for entry in fixed]
            first = values[0] if values else last
            total = self._totals.get(name)
            for value in values[len(known) if total is not None else 1 :]:
                total = _added(total, value, first)
            if total is not None and keeps:
                self._totals[name] = total
                total = total.clone()
            total = _added(total, last, first)
            if total is not None:
                yield name, total.div_(len(entries)).add_(in_float64(first))
            else:
                yield name, first
        if keeps:
            self._summed = [weakref.ref(entry) for entry in fixed]


def _differ(a: Entry | None, b: Entry) -> bool:
    return a is not b


def _added(total: Tensor | None, value: Tensor, first: Tensor) -> Tensor | None:
    """In place; ``None`` for a sum of what is nothing but ``first``."""
    if value is first:
        return total
    wide, base = in_float64(value), in_float64(first)
    term = torch.where(wide == base, 0.0, wide - base)
    return term if total is None else total.add_(term)


def _has_room(parameters: dict[str, Tensor]) -> bool:
    free = free_bytes(torch.device("cpu"))
    size = sum(8 * tensor.numel() for tensor in parameters.values())
    return free is None or size <= SMALL * free
