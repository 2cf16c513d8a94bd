"""A subspace in files, so that a phase that is resumed need not build it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.disk import Disk
from lightning_twa.candidates.files import RESTORE, CandidateFileError, Reference
from lightning_twa.candidates.reference import resolve
from lightning_twa.config import SubspaceConfig
from lightning_twa.machine import all_ranks, say, warn, world_size
from lightning_twa.subspace import Columns, ParameterLayout

__all__ = ["SubspaceFiles", "name_of_subspace"]

KIND = "subspace"  # what names of directories and files begin with
STORED = 1  # to be raised with every change of what Subspace.state_dict() holds


def name_of_subspace(
    config: SubspaceConfig,
    columns: Columns,
    mixing: Tensor,
    candidates: Sequence[str],
    *,
    starts_at_mean: bool,
) -> str:
    """A name for what this process holds of a subspace, which nothing else than that has.

    Args:
        config: What it is built with.
        columns: What is held here.
        mixing: ``(B, k, n)`` float64 on the CPU.
        candidates: Their names.
        starts_at_mean: Whether it has no start of its own.
    """
    layouts = [_described(layout) for layout in (columns.whole, columns.local)]
    pieces = None if columns.pieces is None else [(p.start, p.stop) for p in columns.pieces]
    plain = [STORED, config.bits, list(candidates), starts_at_mean, layouts, pieces]
    sha = hashlib.sha256(json.dumps([*plain, list(mixing.shape)]).encode())
    sha.update(mixing.contiguous().numpy().tobytes())
    return f"{KIND}-{sha.hexdigest()[:32]}"


def _described(layout: ParameterLayout) -> list[Any]:
    tensors = [(spec.name, list(spec.shape), spec.block) for spec in layout.specs]
    return [tensors, list(layout.block_names), str(layout.dtype)]


class SubspaceFiles:
    """The file of a subspace or, where its columns are shared out, a file of each process. They
    have the form of candidates' files, and every byte is checked before they are used. Every
    process calls every method but :meth:`state_dict`.

    Args:
        root: Directory of the candidates' files, in which these have a directory of their own.
        columns: What this process holds.
        device: Device whose backend carries messages.
    """

    def __init__(self, root: Path, columns: Columns, device: torch.device) -> None:
        shards = not columns.everywhere
        self._disk = Disk(root, shards=shards, kind=KIND, in_pieces=True)
        self._device = device
        self._files: list[Reference] = []

    def state_dict(self) -> list[dict[str, Any]]:
        """What a checkpoint says of the files; empty where there are none."""
        return [reference.state_dict() for reference in self._files]

    def write(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Write a subspace, instead of the one before; where that fails, a warning.

        Args:
            tensors: Of :meth:`~lightning_twa.subspace.Subspace.state_dict`.
            name: Of :func:`name_of_subspace`.
        """
        self._unlink()  # but no directory: another process may be writing there by now
        try:
            _, self._files = self._disk.write(
                lambda: Candidate(name, {key: t.cpu() for key, t in tensors.items()}, {})
            )
        except OSError as error:
            if self._disk.directory is not None:
                self._tidy(self._disk.directory)
            warn(
                f"The subspace could not be written to {self._disk.root} ({error}). The phase goes "
                f"on without: resumed, it builds the subspace again. Make room there, or set "
                f"StorageConfig.dirpath."
            )

    def read(self, state: Any, name: str) -> dict[str, Tensor] | None:
        """The tensors of a subspace, mapped where a file in use can be deleted; ``None``
        where its files are not there any more, or another subspace's, after a line that says so.

        Args:
            state: Of :meth:`state_dict`, from a checkpoint.
            name: Of :func:`name_of_subspace`.
        """
        processes = world_size() if self._disk.shards else 1
        try:
            files = [Reference.from_state(entry) for entry in state]
            if len(files) != processes:
                raise CandidateFileError(
                    f"the checkpoint has {len(files)} for as many processes, and now there "
                    f"{'is' if processes == 1 else 'are'} {processes} to read one each"
                )
            candidate = self._disk.read(files)
            if not all_ranks(candidate.name == name, self._device):
                raise CandidateFileError("what it is built of has changed")
        except (CandidateFileError, ValueError) as error:
            reason = str(error).removesuffix(RESTORE).rstrip(" .")
            say(f"TWA: the subspace is built again, because its file cannot be used: {reason}.")
            return None
        self._files = files
        held = candidate.parameters
        return {n: t.clone() for n, t in held.items()} if sys.platform == "win32" else held

    def delete(self) -> None:
        """The subspace is not needed any more, by any process. What cannot be deleted stays."""
        if self._files:
            all_ranks(True, self._device)  # where another host has deleted it no page can be read
        for directory in self._unlink():
            self._tidy(directory)

    def _unlink(self) -> list[Path]:
        """Delete the files; returns where they were."""
        paths = []
        for reference in self._files:
            with contextlib.suppress(OSError, CandidateFileError):
                paths.append(resolve(self._disk.root, reference))
                paths[-1].unlink(missing_ok=True)
        self._files = []
        return [path.parent for path in paths]

    def _tidy(self, directory: Path) -> None:
        """Delete a directory, and those above it in the root, as far as they are empty."""
        root = self._disk.root.resolve()
        with contextlib.suppress(OSError):
            while directory.resolve().is_relative_to(root) and directory.resolve() != root:
                with contextlib.suppress(FileNotFoundError):  # another process was here
                    directory.rmdir()
                directory = directory.parent
