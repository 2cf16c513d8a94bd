"""Candidates of a run that are to outlive it, in files of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.files import make_directory, write_candidate
from lightning_twa.candidates.frozen import FROZEN
from lightning_twa.candidates.reference import SUFFIX
from lightning_twa.candidates.store import Store
from lightning_twa.machine import gather_objects, rank

__all__ = ["keep_in_files"]


def keep_in_files(store: Store, root: Path) -> Path:
    """The directory that holds the candidates of a store, and no other ones; written on rank zero
    where there is none. Every process calls it.

    Args:
        store: Of a model without sharded parameters.
        root: Where a new directory is made.

    Returns:
        The directory, which :func:`find_files` takes.

    Raises:
        OSError: On every process, where it cannot be written; nothing is left behind then.
    """
    store.settle()
    directory, problem = None, None
    if rank() == 0:
        try:
            directory = _directory_of(store) or _write(list(store), root)
        except Exception as error:  # of any kind: the other processes wait for an answer
            problem = f"{type(error).__name__}: {error}"
    directory, problem = gather_objects((directory, problem))[0]
    if problem is not None or directory is None:
        raise OSError(problem)
    return directory


def _directory_of(store: Store) -> Path | None:
    """Where a store's own files are, if all candidates are in files, and all files candidates."""
    if store.disk is None:
        return None
    names = [reference.file for entry in store._entries for reference in entry.files or []]
    paths = {store.disk.root / name for name in names}
    folder = min(paths, default=store.disk.root).parent
    there = {path for path in folder.glob(f"*{SUFFIX}") if path.stem != FROZEN}
    return folder if len(paths) == len(store) and there == paths else None


def _write(candidates: Sequence[Candidate], root: Path) -> Path:
    """What all candidates share, as frozen parameters, is written once."""
    first, *others = (candidate.parameters for candidate in candidates)
    shared = {n: t for n, t in first.items() if all(_is_same(t, o.get(n)) for o in others)}
    directory = make_directory(root)
    try:
        if shared:
            write_candidate(root, directory, Candidate(FROZEN, shared, {}))
        for candidate in candidates:
            own = {n: t for n, t in candidate.parameters.items() if n not in shared}
            write_candidate(root, directory, Candidate(candidate.name, own, candidate.buffers))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _is_same(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are one piece of memory."""
    return (
        other is not None
        and tensor.data_ptr() == other.data_ptr()
        and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    )
