"""What is done to the candidates of a run beside taking them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lightning_twa.candidates.candidate import (
    Candidate,
    agreed_buffers,
    is_kept,
    misfit,
    persistent_buffers,
)
from lightning_twa.candidates.copying import to_cpu
from lightning_twa.candidates.pending import files_for
from lightning_twa.candidates.store import Store, check_files, delete_dropped
from lightning_twa.candidates.unchanged import same
from lightning_twa.machine import all_ranks
from lightning_twa.subspace import local_part

__all__ = ["drop", "keep_last", "misfit_of", "name_files", "take_anew"]


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


def name_files(store: Store, state: dict[str, Any]) -> None:
    """Have what is still being written in files, before the checkpoint that has it is; every
    process calls it.

    Args:
        store: The candidates.
        state: Of :meth:`Store.state_dict`; changed in place.
    """
    store.settle()
    for key, entries in (("given", store._given), ("window", store._window)):
        store._checkpoints[-1] |= files_for(state[key], entries)


def drop(store: Store, names: Collection[str]) -> None:
    """Leave candidates of the window out, as those that have left it."""
    store._dropped += [e for e in store._window if e.name in names]
    store._window = [e for e in store._window if e.name not in names]
    delete_dropped(store)


def misfit_of(store: Store, module: nn.Module) -> str | None:
    """What the first candidate that is not of a module's form lacks, in a sentence."""
    found = (misfit(e.candidate, module, e.as_in_module) for e in store._entries)
    return next((text for text in found if text is not None), None)


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
            kept.append(store._keep(module, entry.name, {}, buffers))
