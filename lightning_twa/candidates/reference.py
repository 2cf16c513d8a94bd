"""Which file a checkpoint may name as a candidate's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

__all__ = ["PIECE", "SUFFIX", "CandidateFileError", "Reference", "resolve"]

SUFFIX = ".safetensors"
PIECE = 1 << 24  # bytes of a piece that has a digest of its own
KINDS: dict[str, type] = {"name": str, "file": str, "size": int, "digest": str}


class CandidateFileError(RuntimeError):
    """A candidate's file is missing, damaged, another one, or outside of the storage root."""


@dataclass(frozen=True)
class Reference:
    """What a checkpoint says about a candidate's file.

    Args:
        name: Name of the candidate, ``"epoch=3"``.
        file: Path relative to the storage root, with ``/`` on every system.
        size: Bytes of the file.
        digest: SHA-256 of the file, 64 hexadecimal digits; or of the digests of its pieces.
        pieces: SHA-256 of each :data:`PIECE` bytes of a file that several cores are to verify.
    """

    name: str
    file: str
    size: int
    digest: str
    pieces: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The entries as plain strings and integers, and of pieces a list."""
        entries = {name: getattr(self, name) for name in KINDS}
        return {**entries, "pieces": list(self.pieces)} if self.pieces else entries

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reference:
        """The reference of :meth:`state_dict`; further entries are ignored.

        Raises:
            ValueError: Naming the entry that is missing or has another type.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"A candidate's reference is a {type(state).__name__}, not a mapping.")
        values: dict[str, Any] = {}
        for name, kind in KINDS.items():
            if name not in state:
                raise ValueError(f"A candidate's reference has no entry {name!r}.")
            value = values[name] = state[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(
                    f"Entry {name!r} of a candidate's reference is a "
                    f"{type(value).__name__}, not {'an int' if kind is int else 'a str'}."
                )
        return cls(**values, pieces=_pieces(state, values["size"]))


def _pieces(state: Mapping[str, Any], size: int) -> tuple[str, ...]:
    pieces = state.get("pieces", [])
    if not isinstance(pieces, list) or not all(isinstance(digest, str) for digest in pieces):
        raise ValueError("Entry 'pieces' of a candidate's reference is no list of str.")
    if pieces and len(pieces) != -(-size // PIECE):
        raise ValueError(
            f"Entry 'pieces' of a candidate's reference has {len(pieces)} digests, not "
            f"{-(-size // PIECE)} for {size} bytes."
        )
    return tuple(pieces)


def resolve(root: Path, reference: Reference) -> Path:
    """The path of a candidate's file, without symbolic links; opens nothing.

    Args:
        root: The storage root.
        reference: From a checkpoint that may be hostile.

    Raises:
        CandidateFileError: When it names no safetensors file inside ``root``.
    """
    windows = PureWindowsPath(reference.file)  # knows both separators, and drives
    inside = not windows.anchor and ".." not in windows.parts
    path = root
    try:
        base = root.resolve()
        if inside and reference.file.endswith(SUFFIX):  # else not even links are followed
            path = (base / reference.file).resolve()
        allowed = path != root and path.is_relative_to(base)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        allowed = False
    if not allowed:
        raise CandidateFileError(
            f"The checkpoint points outside of the storage directory {root}, or not to a "
            f"{SUFFIX} file: {reference.file!r}. Nothing was opened. Do not use this checkpoint "
            f"unless you know who wrote it."
        )
    return path
