"""The candidates of a run: a window of them, in main memory or in files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.candidates.candidate import (
    Candidate,
    agreed_buffers,
    check_weights,
    is_kept,
)
from lightning_twa.candidates.copying import PINNING
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.entry import Entry, entry_state, joined, keep_some, read_entries
from lightning_twa.candidates.files import CandidateFileError
from lightning_twa.candidates.frozen import FROZEN, changing_part, frozen_part, put_frozen_back
from lightning_twa.candidates.pending import SMALL, Pending, warn_not_written
from lightning_twa.candidates.taking import Taking
from lightning_twa.candidates.unverified import damaged, verified
from lightning_twa.config import StorageConfig
from lightning_twa.machine import all_ranks, free_bytes, in_common, warn, world_size

__all__ = ["Store", "check_files", "delete_dropped"]

EMPTY: Mapping[str, Tensor] = MappingProxyType({})


class Store:
    """A window of candidates, oldest first. Every process calls every method.

    Args:
        config: Where they are kept.
        max_candidates: So many are kept; ``None`` keeps all.
        evenly: Whether these are spread evenly, and not the newest.
        root: Directory for files; with ``None`` there are none.
        processes_on_host: Number of processes that share the memory of this one.
        shards: Whether each process has a part of every parameter.
        keep_named: Whether a run may go on from any checkpoint, not only from the newest: files
            that one names are then never deleted.
        device: Device whose backend carries messages.

    Attributes:
        disk: Their files; ``None`` in memory.
        pending: Those that are on their way there.
    """

    def __init__(
        self,
        config: StorageConfig | None = None,
        max_candidates: int | None = None,
        *,
        root: Path | None = None,
        processes_on_host: int = 1,
        shards: bool = False,
        keep_named: bool = False,
        device: torch.device | None = None,
        evenly: bool = False,
    ) -> None:
        self.config = config or StorageConfig(kind="memory")
        self.max_candidates = max_candidates
        self.evenly = evenly
        self.shards = shards
        self.root = root
        self._keep_named = keep_named
        self._shared = processes_on_host > 1 or shards
        self._device = device or torch.device("cpu")
        on_disk = None if self.config.kind == "memory" else root
        self.disk = None if on_disk is None else Disk(on_disk, shards=shards)
        self.pending = Pending(
            self.disk, processes_on_host, self._device, self._refuse, partial(_accept, self)
        )
        self._dtype = torch.bfloat16 if self.config.dtype == "bfloat16" else None
        self._given: list[Entry] = []  # not taken from this run's training: no window
        self._window: list[Entry] = []
        self._frozen: Entry | None = None
        self._spare = 0.0  # bytes of memory that are there for candidates in any case
        self._dropped: list[Entry] = []  # out of the window, but a checkpoint may need them
        self._checkpoints: list[set[str]] = []  # files named by checkpoints, oldest first

    def __getstate__(self) -> dict[str, Any]:
        if world_size() == 1:
            self.settle()
            with contextlib.suppress(CandidateFileError):
                check_files(self)  # a copy may go where the files are not
        return {**vars(self), "_dropped": [e for e in self._dropped if e.is_here]}

    @property
    def _entries(self) -> list[Entry]:
        return [*self._given, *self._window]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Candidate]:
        if world_size() == 1:
            self.pending.arrive()
        if world_size() == 1 and not self.shards:
            check_files(self)
        return (verified(self.disk, entry) for entry in self._entries)

    @property
    def forms(self) -> list[Candidate]:
        """The candidates, to use names and shapes of; values may not have been verified yet."""
        return [entry.candidate for entry in self._entries]

    @property
    def names(self) -> list[str]:
        """Names of the candidates, oldest first."""
        return [entry.name for entry in self._entries]

    @property
    def given_names(self) -> list[str]:
        """Names of those before the window: from files, and of running averages."""
        return [entry.name for entry in self._given]

    @property
    def files(self) -> tuple[Path, int] | None:
        """The directory of this run's files and their bytes; ``None`` when it has written none."""
        if self.disk is None or self.disk.directory is None:
            return None
        entries = [*self._entries, *([self._frozen] if self._frozen is not None else [])]
        return self.disk.directory, sum(f.size for e in entries for f in e.files or [])

    @property
    def nbytes(self) -> int:
        """Bytes of main memory; shared tensors count once, files not, nor what is on its way."""
        return sum(_tensors(e.candidate for e in self._entries if e.in_memory).values())

    def add(self, module: nn.Module, name: str, weights: Mapping[str, Tensor] = EMPTY) -> None:
        """Keep the module's weights, or others by name, as the newest candidate of the window.

        What cannot be written to a file stays in memory, with a warning.

        Raises:
            ValueError: Naming the tensor, when a trainable weight is not finite.
        """
        entry = self._keep(module, name, weights, agreed_buffers(module))
        self._window.append(entry)
        entry.thins_out = True
        if entry.taking is None:  # else when it has arrived: it may be one to refuse
            _accept(self, entry)

    def give(
        self,
        module: nn.Module,
        name: str,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep other weights of the module as a candidate before the window.

        Args:
            module: Where what is missing in ``weights`` is taken from.
            name: Name of the candidate.
            weights: By name of the parameter, the same on every process.
            buffers: On the CPU, the same on every process; ``None`` takes the module's.

        Raises:
            ValueError: Naming the tensor, when a trainable weight is not finite.
        """
        buffers = agreed_buffers(module) if buffers is None else dict(buffers)
        self._given.append(self._keep(module, name, weights, buffers))

    def clear(self) -> None:
        """Forget the window and what was given; files stay as for those out of the window."""
        self.settle()
        self._dropped += self._entries
        self._given, self._window = [], []
        if self.disk is not None:
            self.disk.begin_part()
        delete_dropped(self)

    def _keep(
        self,
        module: nn.Module,
        name: str,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Entry:
        self.pending.arrive()
        on_disk = _goes_to_disk(self, module)
        frozen = _frozen_in_file(self, module, name, weights) if on_disk else None
        if frozen is not None and not self.pending.has_room(_bytes_of(module, trained=True)):
            check_weights(module, name, weights)
            self.pending.settle()
            make = partial(changing_part, module, name, buffers, frozen, self._dtype, weights)
            entry = _write_at_once(self.disk, name, make, frozen)
            if entry is not None:
                return entry
            frozen = None
        previous = self._entries[-1].candidate if len(self) else None
        if frozen is not None:
            previous = Candidate(FROZEN, frozen, {})
        stay, aside = frozen is None, self._device.type in PINNING
        with in_common():
            taking = Taking(
                module, name, buffers, previous, self._dtype, weights, stay=stay, aside=aside
            )
            finite = taking.on_its_way or taking.wait()
        if not all_ranks(finite, self._device):
            check_weights(module, name, weights)
        entry = Entry(taking.candidate)
        if taking.on_its_way:
            entry.taking = taking
            self.pending.send(entry, frozen)
        elif frozen is not None:
            self.pending.begin(entry, frozen)
        return entry

    def _refuse(self, entry: Entry) -> None:
        for entries in (self._given, self._window, self._dropped):
            if entry in entries:
                entries.remove(entry)

    def settle(self) -> None:
        """Wait until what is on its way has arrived: in files, or was found not to be writable."""
        arrived = self.pending.arrive()
        if self.pending.settle() or arrived:
            delete_dropped(self)

    def drop_damaged(self) -> None:
        """Before the candidates are used: drop those whose file has changed, with a warning."""
        self.settle()
        in_files = [entry for entry in self._entries if entry.files is not None]
        for entry, error in damaged(self.disk, in_files):
            warn(f"A candidate is left out: {error}")
            (self._given if entry in self._given else self._window).remove(entry)

    def state_dict(self) -> dict[str, Any]:
        """The candidates, oldest first: names with tensors, or with the files that hold them."""
        if self.shards or world_size() == 1:  # else name_files() comes, where a checkpoint is made
            self.settle()
        missing = sum(entry.files is None for entry in self._entries) if self.shards else 0
        if missing:  # this process's part of them is all that there is here
            warn(
                f"The checkpoint leaves out {missing} candidate(s) that "
                f"could not be written to files: sharded parameters fit into no other place."
            )
        entries = [*self._entries, *([self._frozen] if self._frozen is not None else [])]
        named = {reference.file for entry in entries for reference in entry.files or []}
        self._checkpoints = [*self._checkpoints[0 if self._keep_named else -1 :], named]
        return {
            "given": self._states(self._given),
            "window": self._states(self._window),
            "frozen": None if self._frozen is None else entry_state(self._frozen),
        }

    def _states(self, entries: list[Entry]) -> list[dict[str, Any]]:
        return [entry_state(e) for e in entries if e.files is not None or not self.shards]

    def put_frozen_back(self, module: nn.Module) -> None:
        """Undo :func:`leave_out_frozen`, once the module has the weights of the checkpoint."""
        put_frozen_back([(e.candidate, e.as_in_module) for e in self._entries], module)

    def load_state_dict(self, state: dict[str, Any], *, verify: bool = True) -> None:
        """Replace the candidates by those of :meth:`state_dict`; without ``verify`` every byte of
        their files is compared only when the first value is used.

        Raises:
            CandidateFileError: Naming a file that is missing, damaged or outside of the directory.
            ValueError: When the state is not one of :meth:`state_dict`.
        """
        self.settle()
        frozen = state["frozen"]
        (self._frozen,) = [None] if frozen is None else read_entries(self.disk, [frozen], {})
        shared = {} if self._frozen is None else self._frozen.candidate.parameters
        given = state.get("given", [])
        entries = read_entries(self.disk, [*given, *state["window"]], shared, verify=verify)
        self._given, self._window = entries[: len(given)], entries[len(given) :]
        _thin_out(self)


def _accept(store: Store, entry: Entry) -> None:
    if entry.thins_out:
        _thin_out(store)


def _thin_out(store: Store) -> None:
    if store.max_candidates is not None:
        kept = keep_some(store._window, store.max_candidates, evenly=store.evenly)
        store._dropped += [entry for entry in store._window if entry not in kept]
        store._window[:] = kept  # in place: somebody may be about to append the next one
    delete_dropped(store)


def _goes_to_disk(store: Store, module: nn.Module) -> bool:
    if store.disk is None or store.config.kind == "disk" or store._shared:
        return store.disk is not None
    new = _bytes_of(module)
    store._spare -= new
    if store._spare >= 0 and world_size() == 1:
        return False
    free = free_bytes(torch.device("cpu"))
    room = math.inf if free is None else SMALL * (free + store.nbytes) - store.nbytes
    store._spare = room / 4 - new  # in this it need not be looked at, which takes a while
    return not all_ranks(new <= room, store._device)


def _frozen_in_file(
    store: Store, module: nn.Module, name: str, weights: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """What is frozen, from a file of its own, written once; ``None`` where that fails."""
    assert store.disk is not None
    if store._frozen is None and not all(p.requires_grad for p in module.parameters()):
        try:
            store._frozen = Entry(*store.disk.write(lambda: frozen_part(module, weights)))
        except OSError as error:
            warn_not_written(name, store.disk, error)
            return None
    return {} if store._frozen is None else store._frozen.candidate.parameters


def delete_dropped(store: Store) -> None:
    """Delete files out of the window that no checkpoint to go on from names. Of the two newest
    one may be just being written, and then the other is what a killed run goes on from.
    """
    named = set().union(*store._checkpoints)
    for entry in list(store._dropped):
        files = entry.files or []
        if entry.is_here and not named & {reference.file for reference in files}:
            store._dropped.remove(entry)
            if files and store.disk is not None:
                store.disk.delete(files)


def check_files(store: Store) -> None:
    """Before values are used of candidates that were loaded without: compare the files that have
    not been compared yet; every process calls it.

    Raises:
        CandidateFileError: On every process, naming the file that is damaged.
    """
    for _, error in damaged(store.disk, [e for e in store._entries if not e.verified]):
        raise error


def _write_at_once(
    disk: Disk | None, name: str, make: Callable[[], Candidate], frozen: dict[str, Tensor]
) -> Entry | None:
    """Write a candidate while training waits; ``None``, with a warning, where that fails."""
    assert disk is not None
    try:
        own, files = disk.write(make)
    except OSError as error:
        warn_not_written(name, disk, error)
        return None
    return Entry(joined(own, frozen), files)


def _bytes_of(module: nn.Module, *, trained: bool = False) -> int:
    """Of a candidate, or of what is trained of it."""
    kept = (p for p in module.parameters() if is_kept(p))
    return sum(p.nbytes for p in kept if p.requires_grad or not trained)


def _tensors(candidates: Iterator[Candidate] | Any) -> dict[int, int]:
    """Bytes of the tensors by address."""
    return {
        t.data_ptr(): t.nbytes
        for c in candidates
        for t in (*c.parameters.values(), *c.buffers.values())
    }
