"""Candidates as safetensors files, mapped into memory when they are read."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EEXIST, EINVAL, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM
from pathlib import Path, PureWindowsPath

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.encoding import decode, encode
from lightning_twa.candidates.reference import (
    PIECE,
    SUFFIX,
    CandidateFileError,
    Reference,
    resolve,
)

__all__ = [
    "RESTORE",
    "CandidateFileError",
    "Reference",
    "delete_candidate",
    "make_directory",
    "read_candidate",
    "verify_candidate",
    "write_candidate",
]

RESTORE = (
    "Restore the directory that belongs to the checkpoint, name it as StorageConfig.dirpath (the "
    "default is twa_candidates in the Trainer's default_root_dir), or start anew."
)
CHUNK = 1 << 20  # bytes that are read at a time
_UNSUPPORTED = {EACCES, EINVAL, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM}


def make_directory(root: Path, name: str = "version") -> Path:
    """Make the first of ``root/version_0``, ``root/version_1``, ... that does not exist.

    Processes that call it at the same time get different directories.

    Args:
        root: The storage root; made, with its parents, when missing.
        name: What stands before the number.
    """
    root.mkdir(parents=True, exist_ok=True)
    k = 0
    while True:
        directory = root / f"{name}_{k}"
        try:
            directory.mkdir()
        except FileExistsError:
            k += 1
            continue
        _sync_directory(root)
        return directory


def write_candidate(
    root: Path, directory: Path, candidate: Candidate, *, in_pieces: bool = False
) -> Reference:
    """Write a candidate to ``<directory>/<name>.safetensors``, completely or not at all.

    The tensors are called ``parameters.<name>`` and ``buffers.<name>``. The file appears under its
    name only when its bytes are on the disk; one that is there is never replaced.

    Args:
        root: The storage root.
        directory: An existing directory in it.
        candidate: On the CPU; its tensors may share memory and need not be contiguous.
        in_pieces: Whether each piece of the file gets a digest, so that several cores verify it.

    Raises:
        FileExistsError: When there is a file of that name.
        TypeError: Naming the tensor whose dtype or layout safetensors cannot store.
        ValueError: When the candidate's name is no file name, or the directory is not in the root.
        OSError: When the disk is full or not writable.
    """
    if sys.byteorder != "little":
        raise OSError(ENOTSUP, "Candidates are written on little-endian machines only")
    if not candidate.name or PureWindowsPath(candidate.name).name != candidate.name:
        raise ValueError(f"A candidate cannot have the name {candidate.name!r} in a file name.")
    path = directory / f"{candidate.name}{SUFFIX}"
    file = path.relative_to(root).as_posix()
    # The random part keeps apart threads, and processes of one number on several machines
    temporary = directory / f"{candidate.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    digests, size = _Digests(PIECE if in_pieces else None), 0
    _check_free(path)
    try:
        with open(temporary, "xb") as out:
            for part in encode(candidate):
                out.write(part)
                digests.update(part)
                size += len(part)
            out.flush()
            os.fsync(out.fileno())
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(directory)
    digest, pieces = digests.finish()
    return Reference(candidate.name, file, size, digest, pieces)


class _Digests:
    """SHA-256 of what is written, or of each of its pieces.

    Args:
        piece: Bytes of a piece; ``None`` for the whole.
    """

    def __init__(self, piece: int | None) -> None:
        self._piece, self._sha, self._taken = piece, hashlib.sha256(), 0
        self._found: list[str] = []

    def update(self, part: memoryview) -> None:
        """Take what comes next."""
        while self._piece is not None and self._taken + len(part) > self._piece:
            room = self._piece - self._taken
            self._sha.update(part[:room])
            part = part[room:]
            self._found.append(self._sha.hexdigest())
            self._sha, self._taken = hashlib.sha256(), 0
        self._sha.update(part)
        self._taken += len(part)

    def finish(self) -> tuple[str, tuple[str, ...]]:
        """The digest, and those of the pieces."""
        last = self._sha.hexdigest()
        if self._piece is None:
            return last, ()
        pieces = (*self._found, last)
        return hashlib.sha256("".join(pieces).encode()).hexdigest(), pieces


def read_candidate(root: Path, reference: Reference, *, verify: bool = True) -> Candidate:
    """Map a candidate's file into memory, after checking every byte of it.

    The tensors occupy no memory of their own: the system loads their pages when they are used,
    shares them between processes, and drops them when memory is short. Writing to a tensor does not
    change the file. The file may be deleted (not on Windows), but must not be truncated, while a
    tensor is in use.

    Args:
        root: The storage root.
        reference: What :func:`write_candidate` returned.
        verify: Compare the digest, which reads the whole file.

    Returns:
        The candidate, with the order of its tensors and their dtypes in the file.

    Raises:
        CandidateFileError: When the file is missing, not readable, damaged, another candidate's, of
            another version of the format, or not inside ``root``.
    """
    path = resolve(root, reference)
    _check_file(path, reference)
    for piece in range(len(reference.pieces) or 1) if verify else ():
        _check_bytes(path, reference, piece)
    try:
        candidate = decode(str(path))
    except ValueError as error:
        raise CandidateFileError(f"{path} {error}") from error
    if candidate.name != reference.name:
        raise CandidateFileError(
            f"{path} holds candidate {candidate.name!r}, but the checkpoint expects "
            f"{reference.name!r}. {RESTORE}"
        )
    return candidate


def verify_candidate(root: Path, reference: Reference, piece: int = 0) -> None:
    """Compare every byte of a candidate's file, or of a piece of it, with its digest.

    Args:
        root: The storage root.
        reference: What :func:`write_candidate` returned.
        piece: Which, where there are pieces.

    Raises:
        CandidateFileError: When the file is missing, not readable, damaged, or not inside ``root``.
    """
    path = resolve(root, reference)
    _check_file(path, reference)
    _check_bytes(path, reference, piece)


def delete_candidate(root: Path, reference: Reference) -> None:
    """Delete a candidate's file; one that is gone already is no error.

    Raises:
        CandidateFileError: When the file is not inside ``root``.
        OSError: When the file system refuses.
    """
    resolve(root, reference).unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what is wrong with a file that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise CandidateFileError(f"{path} is missing. {RESTORE}") from error
    except OSError as error:
        raise CandidateFileError(
            f"{path} is not readable ({error}). Check its permissions and the disk."
        ) from error


def _check_file(path: Path, reference: Reference) -> None:
    with _reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CandidateFileError(f"{path} is not a regular file. {RESTORE}")
    if status.st_size != reference.size:
        raise CandidateFileError(
            f"{path} has {status.st_size} bytes instead of {reference.size}: it is truncated "
            f"or another file. {RESTORE}"
        )


def _check_bytes(path: Path, reference: Reference, piece: int) -> None:
    sha = hashlib.sha256()
    digest = reference.pieces[piece] if reference.pieces else reference.digest
    left = PIECE if reference.pieces else reference.size
    # Read, not mapped: pages of a mapping would count as memory of this process
    buffer = memoryview(bytearray(CHUNK))
    with _reading(path), open(path, "rb", 0) as file:
        file.seek(piece * PIECE)
        while left and (count := file.readinto(buffer[:left])):
            sha.update(buffer[:count])
            left -= count
    if sha.hexdigest() != digest:
        raise CandidateFileError(f"{path} is damaged: its SHA-256 is another one. {RESTORE}")


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(EEXIST, "A candidate's file exists and is not replaced", str(path))


def _publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, unless the name is taken."""
    try:
        os.link(temporary, path)  # a rename would replace a file that another process has made
    except FileExistsError:
        _check_free(path)
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # FAT and some network file systems have no links
        _check_free(path)
        temporary.rename(path)


def _sync_directory(directory: Path) -> None:
    """Bring new names to the disk, where the system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
