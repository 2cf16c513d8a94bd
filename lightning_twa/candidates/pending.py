"""Candidates that are on their way, from a device and into files, while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.copying import PINNING
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.entry import Entry, entry_state, joined
from lightning_twa.machine import all_ranks, free_bytes, in_common, warn, world_size
from lightning_twa.subspace import check_finite

__all__ = ["SMALL", "Pending", "files_for", "warn_not_written"]

SMALL = 0.25  # of free memory that candidates may take there
MOST = 2  # candidates on their way into files at the same time
STEPS = 8  # of the optimizer, after which a device has sent what it was asked for before


class Pending:
    """The newest candidate while a device is sending it, and those whose files threads are writing,
    oldest first. Each waits in the memory of every process until its file is there. Every process
    calls every method but :meth:`leave`.

    Args:
        disk: Where they go; ``None`` where none goes there.
        processes_on_host: Number of processes that share the memory of this one.
        device: Device whose backend carries messages.
        refuse: Called with an entry that is not to be kept.
        accept: Called with one that a device has sent and that is.
    """

    def __init__(
        self,
        disk: Disk | None,
        processes_on_host: int,
        device: torch.device,
        refuse: Callable[[Entry], None],
        accept: Callable[[Entry], None],
    ) -> None:
        self._disk = disk
        self._processes = processes_on_host
        self._device = device
        self._refuse = refuse
        self._accept = accept
        self._entries: list[Entry] = []
        self._sent: tuple[Entry, Mapping[str, Tensor] | None] | None = None
        self._steps = 0  # since then

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_entries": [], "_sent": None}  # a copy has them in memory

    def send(self, entry: Entry, frozen: Mapping[str, Tensor] | None) -> None:
        """A device sends a candidate; the one before has arrived.

        Args:
            entry: Of the candidate.
            frozen: What another file holds of it; ``None`` where it stays in memory.
        """
        self._sent, self._steps = (entry, frozen), 0

    def arrive(self, *, after_steps: bool = False) -> bool:
        """Wait for the newest candidate where a device is still sending it.

        Args:
            after_steps: Only after some optimizer steps; to be called after each.

        Returns:
            Whether it has arrived now.

        Raises:
            ValueError: Naming the tensor that is not finite; the candidate is not kept then.
        """
        self._steps += after_steps
        if self._sent is None or (after_steps and self._steps < STEPS):
            return False
        (entry, frozen), self._sent = self._sent, None
        taking = entry.taking
        assert taking is not None
        try:
            with in_common():
                finite = taking.wait()
            if not all_ranks(finite, self._device):
                with in_common(ValueError):
                    _check(entry)
        except Exception:
            self._refuse(entry)
            raise
        except BaseException:  # an interrupt: it is still to be waited for
            self._sent = (entry, frozen)
            raise
        entry.taking = None
        if frozen is not None:
            self.begin(entry, frozen)
        self._accept(entry)
        return True

    def has_room(self, size: int) -> bool:
        """Whether candidates of so many bytes may wait in memory, in every process of a host."""
        free = free_bytes(torch.device("cpu"))
        most = MOST + (self._device.type in PINNING)  # of these one is only being sent
        room = free is None or size * most * self._processes <= SMALL * free
        return all_ranks(room, self._device)

    def begin(self, entry: Entry, frozen: Mapping[str, Tensor]) -> None:
        """Begin to write a candidate, which gets its files when it has arrived. Of those before it
        one may still be on its way.

        Args:
            entry: With the candidate in memory.
            frozen: What another file holds of it.
        """
        assert self._disk is not None
        self.settle(MOST - 1)
        candidate = entry.candidate
        changing = {k: t for k, t in candidate.parameters.items() if t is not frozen.get(k)}
        own = Candidate(candidate.name, changing, candidate.buffers)
        try:
            entry.writing = self._disk.begin(own)
        except OSError as error:
            warn_not_written(candidate.name, self._disk, error)
            return
        entry.candidate = joined(own, frozen)
        self._entries.append(entry)

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
            warn_not_written(entry.name, self._disk, error)
            return
        entry.hold(own)
        entry.files, entry.writing = files, None

    def leave(self) -> None:
        """After an exception, which other processes may not have had: nothing is on its way any
        more. Of several processes each keeps what was in memory; their files stay, complete, for
        whoever needs them, and what comes goes to other ones. What is not finite is not kept.
        """
        if world_size() == 1:
            with suppress(Exception):
                self.arrive()
            self.settle()
            return
        if self._sent is not None:
            (entry, _), self._sent = self._sent, None
            if not _is_finite(entry):
                self._refuse(entry)
            entry.taking = None
        for entry in self._entries:
            if entry.writing is not None:
                entry.writing.wait()
            entry.writing = None
        if self._entries and self._disk is not None:
            self._disk.begin_part()
        self._entries = []


def _is_finite(entry: Entry) -> bool:
    """As far as this process can tell."""
    try:
        if entry.taking is not None and not entry.taking.wait():
            _check(entry)
    except Exception:  # of the device, too
        return False
    return True


def _check(entry: Entry) -> None:
    """Raise where what is trained is not finite; a sum that overflows is no error."""
    assert entry.taking is not None
    for name in entry.taking.trained:
        values = entry.candidate.parameters[name]
        check_finite(values, f"Candidate {entry.name!r}, tensor {name!r},")


def files_for(states: list[dict[str, Any]], entries: Sequence[Entry]) -> set[str]:
    """Give what a checkpoint has of candidates the files that they have by now.

    Args:
        states: Of candidates in a checkpoint; changed in place.
        entries: The candidates.

    Returns:
        The files.
    """
    by_name = {entry.name: entry for entry in entries if entry.files is not None}
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
