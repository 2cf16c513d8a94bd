"""Which file a checkpoint may name as a candidate's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PureWindowsPath
from typing import Any

__all__ = ["SUFFIX", "CandidateFileError", "Reference", "resolve"]

SUFFIX = ".safetensors"


class CandidateFileError(RuntimeError):
    """A candidate's file is missing, damaged, another one, or outside of the storage root."""


@dataclass(frozen=True)
class Reference:
    """What a checkpoint says about a candidate's file.

    Args:
        name: Name of the candidate, ``"epoch=3"``.
        file: Path relative to the storage root, with ``/`` on every system.
        size: Bytes of the file.
        digest: SHA-256 of the file, 64 hexadecimal digits.
    """

    name: str
    file: str
    size: int
    digest: str

    def state_dict(self) -> dict[str, str | int]:
        """The entries as plain strings and integers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reference:
        """The reference of :meth:`state_dict`; further entries are ignored.

        Raises:
            ValueError: Naming the entry that is missing or has another type.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"A candidate's reference is a {type(state).__name__}, not a mapping.")
        values: dict[str, Any] = {}
        for field in fields(cls):
            kind = int if field.name == "size" else str
            if field.name not in state:
                raise ValueError(f"A candidate's reference has no entry {field.name!r}.")
            value = values[field.name] = state[field.name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(
                    f"Entry {field.name!r} of a candidate's reference is a "
                    f"{type(value).__name__}, not {'an int' if kind is int else 'a str'}."
                )
        return cls(**values)


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
