"""Candidates that are on their way into files, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.entry import Entry, entry_state, joined
from lightning_twa.machine import all_ranks, free_bytes, warn, world_size

__all__ = ["SMALL", "Pending", "files_for", "warn_not_written"]

SMALL = 0.25  # of free memory that candidates may take there
MOST = 2  # candidates on their way at the same time


class Pending:
    """Candidates whose files threads are writing, oldest first. Each waits in the memory of every
    process until its file is there. Every process calls every method but :meth:`leave`.

    Args:
        disk: Where they go; ``None`` where none goes there.
        processes_on_host: Number of processes that share the memory of this one.
        device: Device whose backend carries messages.
    """

    def __init__(self, disk: Disk | None, processes_on_host: int, device: torch.device) -> None:
        self._disk = disk
        self._processes = processes_on_host
        self._device = device
        self._entries: list[Entry] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_entries": []}  # a copy has them in memory

    def has_room(self, size: int) -> bool:
        """Whether candidates of so many bytes may wait in memory, in every process of a host."""
        free = free_bytes(torch.device("cpu"))
        room = free is None or size * MOST * self._processes <= SMALL * free
        return all_ranks(room, self._device)

    def begin(self, candidate: Candidate, frozen: Mapping[str, Tensor]) -> Entry:
        """Begin to write a candidate. Of those before it one may still be on its way.

        Args:
            candidate: In memory.
            frozen: What another file holds of it.
        """
        assert self._disk is not None
        self.settle(MOST - 1)
        changing = {k: t for k, t in candidate.parameters.items() if t is not frozen.get(k)}
        own = Candidate(candidate.name, changing, candidate.buffers)
        try:
            entry = Entry(joined(own, frozen), writing=self._disk.begin(own))
        except OSError as error:
            warn_not_written(candidate.name, self._disk, error)
            return Entry(candidate)
        self._entries.append(entry)
        return entry

    def settle(self, most: int = 0) -> bool:
        """Wait until no more are on their way than ``most``. What could not be written stays in
        memory, with a warning.

        Returns:
            Whether any has arrived.
        """
        before = len(self._entries)
        while self._entries and (len(self._entries) > most or self._oldest_is_there()):
            self._finish(self._entries[0])
            del self._entries[0]
        return len(self._entries) < before

    def _oldest_is_there(self) -> bool:
        writing = self._entries[0].writing
        return all_ranks(writing is None or writing.done, self._device)

    def _finish(self, entry: Entry) -> None:
        if entry.writing is None:
            return
        assert self._disk is not None
        try:
            own, files = self._disk.finish(entry.writing)
        except OSError as error:
            entry.writing = None
            warn_not_written(entry.candidate.name, self._disk, error)
            return
        entry.hold(own)
        entry.files, entry.writing = files, None

    def leave(self) -> None:
        """After an exception, which other processes may not have had: nothing is on its way any
        more. Of several processes each keeps what was in memory; their files stay, complete, for
        whoever needs them, and what comes goes to other ones.
        """
        if world_size() == 1:
            self.settle()
            return
        for entry in self._entries:
            if entry.writing is not None:
                entry.writing.wait()
            entry.writing = None
        if self._entries and self._disk is not None:
            self._disk.begin_part()
        self._entries = []


def files_for(states: list[dict[str, Any]], entries: Sequence[Entry]) -> set[str]:
    """Give what a checkpoint has of candidates the files that they have by now.

    Args:
        states: Of candidates in a checkpoint; changed in place.
        entries: The candidates.

    Returns:
        The files.
    """
    by_name = {entry.candidate.name: entry for entry in entries if entry.files is not None}
    named: set[str] = set()
    for i, state in enumerate(states):
        entry = by_name.get(state["name"])
        if entry is not None:
            states[i] = entry_state(entry)
            named |= {reference.file for reference in entry.files or []}
    return named


def warn_not_written(name: str, disk: Disk, error: Exception) -> None:
    """Say that a candidate stays in memory."""
    warn(
        f"Candidate {name!r} could not be written to {disk.root} ({error}). It is "
        f"kept in memory instead. Make room there, or set StorageConfig.dirpath."
    )
