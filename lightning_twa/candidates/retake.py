"""Candidates that are taken after all: the weights a run has arrived at, and those of a checkpoint
as the module would load them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_twa.candidates.candidate import (
    Candidate,
    agreed_buffers,
    is_kept,
    persistent_buffers,
)
from lightning_twa.candidates.copying import to_cpu
from lightning_twa.candidates.store import Store, check_files
from lightning_twa.candidates.unchanged import same
from lightning_twa.machine import all_ranks
from lightning_twa.subspace import local_part

__all__ = ["keep_last", "take_anew"]


def keep_last(store: Store, module: nn.Module, name: str) -> None:
    """Keep the module's weights as the newest candidate, whatever the window holds, unless its
    newest are these already; every process calls it.
    """
    dtype, held = store._dtype, store._window[-1:]
    same_as_newest = bool(held)
    for key, parameter in module.named_parameters():
        if not (same_as_newest and parameter.requires_grad and is_kept(parameter)):
            continue
        newest, now = held[0].candidate.parameters.get(key), to_cpu(local_part(parameter))
        same_as_newest = newest is not None and same(newest, now.to(dtype or now.dtype))
    if not all_ranks(same_as_newest, store._device) and name not in store.names:
        store._window.append(store._keep(module, name, {}, agreed_buffers(module)))


def take_anew(store: Store, module: nn.Module, load: Callable[[Candidate], None]) -> None:
    """Replace every candidate by what a module holds once it has loaded it.

    Args:
        store: The candidates.
        module: The model.
        load: Puts a candidate into the module.
    """
    store.settle()
    check_files(store)
    given, window = store._given, store._window
    store._given, store._window, store._frozen = [], [], None
    if store.disk is not None:
        store.disk.begin_part()
    for entries, kept in ((given, store._given), (window, store._window)):
        for entry in entries:
            load(entry.candidate)
            buffers = {n: to_cpu(b) for n, b in persistent_buffers(module).items()}
            kept.append(store._keep(module, entry.candidate.name, {}, buffers))
