"""Candidates of a checkpoint that are mapped before the bytes of their files have been compared
with their digests: whoever uses them has that done first.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.entry import Entry
from lightning_twa.candidates.files import CandidateFileError

__all__ = ["damaged", "verified"]


def damaged(disk: Disk | None, entries: Sequence[Entry]) -> list[tuple[Entry, CandidateFileError]]:
    """Compare files with their digests; every process calls it.

    Args:
        disk: Where they are.
        entries: Of candidates in files. What was not verified before is mapped anew, and is then.

    Returns:
        Those whose file is damaged, each with what is wrong.
    """
    if not entries:
        return []
    assert disk is not None
    problems = []
    found = disk.read_all([entry.files or [] for entry in entries])
    for entry, answer in zip(entries, found, strict=True):
        if isinstance(answer, CandidateFileError):
            problems.append((entry, answer))
        elif not entry.verified:
            entry.hold(answer)
    return problems


def verified(disk: Disk | None, entry: Entry) -> Candidate:
    """A candidate of which every byte has been compared, by now or for this call: one process alone
    may ask for it.

    Raises:
        CandidateFileError: When its file is damaged.
    """
    if entry.verified:
        return entry.candidate
    assert disk is not None
    assert entry.files is not None
    return entry.joined_with(disk.read_here(entry.files))
