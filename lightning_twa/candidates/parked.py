"""Sharded tensors that are no candidates yet: they travel beside a checkpoint, in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.copying import to_cpu
from lightning_twa.candidates.entry import Entry, entry_state, read_entries
from lightning_twa.candidates.store import Store, delete_dropped
from lightning_twa.machine import warn

__all__ = ["Parked"]


class Parked:
    """Running averages of sharded parameters, of which the callback's state in a checkpoint could
    hold one process's part only: each process writes its own. Every process calls every method.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._updates = 0  # that they have had

    def dump(
        self, store: Store, updates: int, averages: Mapping[str, Mapping[str, Tensor]]
    ) -> list[dict[str, Any]] | None:
        """What the checkpoint that is being written has of them.

        Args:
            store: Whose files they are beside, and whose state is in the checkpoint.
            updates: How many they have had; those of one number are written once.
            averages: This process's parts, by name.

        Returns:
            Their names and files; ``None``, with a warning, where they could not be written.
        """
        if not self._entries or updates != self._updates:
            assert store.disk is not None, "check_trainer() has seen to it"
            entries = []
            try:
                for name, tensors in averages.items():
                    make = partial(_part, f"{name}-{updates}", tensors)
                    entries.append(Entry(*store.disk.write(make)))
            except OSError as error:
                warn(
                    f"The running averages could not be written to {store.disk.root} ({error}), "
                    f"and those of sharded parameters have no other place in a checkpoint: a run "
                    f"that is resumed from it begins them anew. Make room there, or set "
                    f"StorageConfig.dirpath."
                )
                return None
            store._dropped += self._entries
            self._entries, self._updates = entries, updates
        named = {reference.file for entry in self._entries for reference in entry.files or []}
        store._checkpoints[-1] |= named
        delete_dropped(store)
        return [entry_state(entry) for entry in self._entries]

    def load(
        self, store: Store, updates: int, states: Sequence[dict[str, Any]]
    ) -> list[dict[str, Tensor]]:
        """This process's parts, from :meth:`dump`.

        Raises:
            CandidateFileError: Naming a file that is missing or damaged.
            ValueError: When the callback keeps no files.
        """
        self._entries, self._updates = read_entries(store.disk, states, {}), updates
        return [entry.candidate.parameters for entry in self._entries]


def _part(name: str, tensors: Mapping[str, Tensor]) -> Candidate:
    return Candidate(name, {key: to_cpu(tensor) for key, tensor in tensors.items()}, {})
