"""Candidates and their files, and which of a window are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_twa.candidates.background import Writing
from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.files import CandidateFileError, Reference
from lightning_twa.candidates.taking import Taking

__all__ = ["Entry", "entry_state", "joined", "keep_some", "read_entries"]


class Entry:
    """A candidate and, where it is on disk, its files. A checkpoint may leave out parameters that
    are as in the module that it holds.

    Args:
        candidate: Mapped where there are files, else in memory.
        files: ``None`` in memory.
        as_in_module: Names of what a checkpoint has left out.
        verified: Whether the files have been compared with their digests since a checkpoint named
            them. Before that nothing but names and shapes may be used.

    Attributes:
        taking: While a device is sending it.
        writing: While a thread writes the files; the candidate is in memory until they are there.
        thins_out: Whether the window, which may hold so many, is thinned out for it.
    """

    def __init__(
        self,
        candidate: Candidate,
        files: list[Reference] | None = None,
        as_in_module: tuple[str, ...] = (),
        *,
        verified: bool = True,
    ) -> None:
        self._candidate = candidate
        self.files = files
        self.as_in_module = as_in_module
        self.taking: Taking | None = None
        self.writing: Writing | None = None
        self.verified = verified
        self.thins_out = False

    @property
    def name(self) -> str:
        """Of the candidate; nobody waits for it."""
        return self._candidate.name

    @property
    def candidate(self) -> Candidate:
        """The candidate, once it has its values."""
        if self.taking is not None:
            self.taking.wait()
        return self._candidate

    @candidate.setter
    def candidate(self, candidate: Candidate) -> None:
        self._candidate = candidate

    @property
    def is_here(self) -> bool:
        """Whether it is not on its way."""
        return self.taking is None and self.writing is None

    @property
    def in_memory(self) -> bool:
        """Whether it is there to stay."""
        return self.files is None and self.writing is None

    def joined_with(self, own: Candidate) -> Candidate:
        """What a file holds, with what another file holds of this candidate."""
        held = self.candidate.parameters
        frozen = {name: tensor for name, tensor in held.items() if name not in own.parameters}
        return joined(own, frozen)

    def hold(self, own: Candidate) -> None:
        """Take what its file holds, which has been written or verified."""
        self.candidate, self.verified = self.joined_with(own), True

    def __getstate__(self) -> dict[str, Any]:
        whole = {**vars(self), "_candidate": self.candidate}
        return {**whole, "taking": None, "writing": None}  # a copy has it in memory


def joined(own: Candidate, frozen: Mapping[str, Tensor]) -> Candidate:
    """A candidate with what is frozen."""
    return Candidate(own.name, {**frozen, **own.parameters}, own.buffers)


def entry_state(entry: Entry) -> dict[str, Any]:
    """What a checkpoint has of a candidate."""
    candidate = entry.candidate
    if entry.files is not None:
        files = [reference.state_dict() for reference in entry.files]
        return {"name": candidate.name, "files": files}
    return {
        "name": candidate.name,
        "parameters": dict(candidate.parameters),
        "buffers": dict(candidate.buffers),
    }


def read_entries(
    disk: Disk | None,
    states: Sequence[dict[str, Any]],
    frozen: Mapping[str, Tensor],
    *,
    verify: bool = True,
) -> list[Entry]:
    """Candidates of a checkpoint, from :func:`entry_state`.

    Args:
        disk: Where files are; every process calls it where there are some.
        states: Of the candidates.
        frozen: What another file holds of them.
        verify: Compare files with their digests now.

    Raises:
        CandidateFileError: Naming a file that is missing, damaged or outside of the directory.
        ValueError: When the callback keeps no files.
    """
    files = {
        i: [Reference.from_state(reference) for reference in state["files"]]
        for i, state in enumerate(states)
        if "files" in state
    }
    if files and disk is None:
        first = next(iter(files.values()))
        raise ValueError(
            f"The checkpoint's candidates are in files ({first[0].file}), but this callback "
            f"has StorageConfig(kind='memory'). Resume with kind='auto' or 'disk'."
        )
    named = [*files.values()]
    mapped = iter([] if disk is None or not files else disk.read_all(named, verify=verify))
    entries = []
    for i, state in enumerate(states):
        if i in files:
            found = next(mapped)
            if isinstance(found, CandidateFileError):
                raise found
            entries.append(Entry(joined(found, frozen), files[i], verified=verify))
        else:
            held = Candidate(state["name"], dict(state["parameters"]), state["buffers"])
            entries.append(Entry(held, as_in_module=tuple(state.get("as_in_module", ()))))
    return entries


def keep_some(window: Sequence[Entry], limit: int, *, evenly: bool) -> list[Entry]:
    """What of a window to keep when its newest has come: the newest; or, evenly, the first, those
    that are multiples of one distance from it, and the newest. The distance is doubled when there
    are too many.

    Args:
        window: Oldest first, named by epoch or step.
        limit: How many may be kept; two at least.
        evenly: Which.
    """
    if not evenly:
        return list(window[-limit:])
    times = [int(entry.name.partition("=")[2]) for entry in window]
    if len(window) < 3:
        return list(window)
    on_grid = (times[-2] - times[0]) % (times[1] - times[0]) == 0
    kept = list(window) if on_grid else [*window[:-2], window[-1]]
    return kept if len(kept) <= limit else [*kept[:-1:2], kept[-1]]
