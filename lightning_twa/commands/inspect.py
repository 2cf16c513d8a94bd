"""What a checkpoint or a file of a candidate tells a person.

A checkpoint may come from somebody else: of the files that it names only those inside of the
storage directory are looked for. They are not opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import safetensors
import torch
from torch import Tensor

from lightning_twa.candidates import (
    SUFFIX,
    CandidateFileError,
    Reference,
    decode,
    find_files,
    resolve,
)
from lightning_twa.checkpoint import candidate_entries, file_references, read_state
from lightning_twa.results import Result, effective_candidates
from lightning_twa.words import count, printable

__all__ = ["describe_candidates", "describe_run", "is_candidates"]

MOST_BLOCKS = 6  # columns of the table; more blocks are summed up
STORAGE = "twa_candidates"  # the default storage directory, in the Trainer's default_root_dir
LEVELS = 5  # root/lightning_logs/version_0/checkpoints/last.ckpt is 4 below it


# --- runs


def describe_run(path: Path, storage: Path | None = None) -> list[str]:
    """Phase, settings, candidates and averaging weights of a checkpoint, line by line.

    Args:
        path: A Lightning checkpoint.
        storage: The storage directory, where candidates are in files; ``None`` looks for
            ``twa_candidates`` beside the checkpoint and in the directories above.

    Raises:
        ValueError: See :func:`~lightning_twa.checkpoint.read_state`.
    """
    state = read_state(path)
    names, weights = state["candidate_names"], state.get("averaging_weights")
    lines = [f"phase: {state['phase']}   format: {state['format_version']}"]
    if state.get("cycle", 0):
        lines.append(f"cycle: {state['cycle'] + 1}")
    if "started" in state:
        started = state["started"]
        phased = state["phase"] == "optimize" or "path" in state  # else a uniform average
        what = "phase began" if phased else "averaged"
        lines.append(f"{what}: epoch {started['epoch']}, optimizer step {started['step']}")
    if state["phase"] == "optimize":
        lines.append(f"optimizer steps of the phase: {_steps(state)}")
    given = {k: v for k, v in state.get("settings", {}).items() if v is not None}
    lines += [f"{name}: {str(value)[:80]}" for name, value in given.items()]
    lines.append(f"candidates: {len(names)}{_where(state)}")
    lines += _files(state, path, storage)
    if "result" in state:
        lines += ["", *str(Result.from_state(state["result"])).splitlines(), ""]
    if weights is None:
        return [*lines, *(f"  {name}" for name in names)]
    lines.append(f"effective number of candidates: {effective_candidates(weights):.1f}")
    return [*lines, "", *_table(names, weights, state["block_names"])]


def _steps(state: Mapping[str, Any]) -> int:
    before = state["groups"]["steps_before"] if "groups" in state else 0
    return int(before + state["optimizer"]["steps"])


def _where(state: Mapping[str, Any]) -> str:
    if state["phase"] == "done":
        return "; not in the checkpoint, the phase is finished"
    entries = candidate_entries(state)
    held = [e for e in entries if "files" not in e]
    averages = state["candidates"].get("averages", {}).get("averages", [])
    averages = [average for average in averages if "files" not in average]
    tensors = {
        t.data_ptr() if t.layout == torch.strided else id(t): t.numel() * t.element_size()
        for part in [*(e[key] for e in held for key in ("parameters", "buffers")), *averages]
        for t in part.values()
    }
    parts = []
    if tensors:
        running = f", {len(averages)} of them running averages" if averages else ""
        number = len(held) + len(averages)
        parts.append(f"{number} in the checkpoint ({_mib(sum(tensors.values()))}{running})")
    references = list(file_references(state))
    if references:
        size = sum(reference.size for reference in references)
        parts.append(f"{count(len(references), 'file')} ({_mib(size)})")
    return f"; {', '.join(parts)}" if parts else ""


def _files(state: Mapping[str, Any], path: Path, storage: Path | None) -> list[str]:
    """Which of the files that a checkpoint names are there."""
    references = list(file_references(state))
    if not references:
        return []
    outside = [r.file for r in references if not _is_inside(r)]
    inside = [r for r in references if _is_inside(r)]
    lines = [f"  outside of the storage directory, not looked for: {file}" for file in outside]
    roots = [storage] if storage is not None else _storage_directories(path)
    found = [root for root in roots if root.is_dir()]
    if storage is not None and not found:
        raise ValueError(f"{storage} is no directory. Name the one given as StorageConfig.dirpath.")
    if not found:
        where = ", ".join(sorted({r.file.rpartition("/")[0] for r in inside}))
        return [
            *lines,
            f"  files in {where} of a storage directory that was not found: no {STORAGE} in "
            f"{path.absolute().parent} or above; name it with --candidates",
        ]
    root = max(found, key=lambda r: sum(_problem(r, ref) is None for ref in inside))
    problems = [(r.file, _problem(root, r)) for r in inside]
    missing = [f"  {file}: {problem}" for file, problem in problems if problem is not None]
    complete = "" if missing or outside else ", all there"
    return [*lines, f"  storage directory: {root}{complete}", *missing]


def _is_inside(reference: Reference) -> bool:
    """Whether a path is relative and goes down only, by its text alone."""
    windows = PureWindowsPath(reference.file)
    text = reference.file
    return not (windows.anchor or text.startswith("/") or ".." in windows.parts or "\0" in text)


def _storage_directories(path: Path) -> list[Path]:
    return [folder / STORAGE for folder in list(path.absolute().parents)[:LEVELS]]


def _problem(root: Path, reference: Reference) -> str | None:
    """What is wrong with a candidate's file, which is not opened; ``None`` if nothing."""
    try:
        path = resolve(root, reference)
        size = path.stat().st_size if path.is_file() else None
    except CandidateFileError:
        return "leads out of the storage directory by a link, or is no safetensors file"
    except OSError as error:
        return f"not readable ({error.strerror})"
    if size is None:
        return "missing"
    if size != reference.size:
        return f"damaged, {size} bytes instead of {reference.size}"
    return None


def _table(names: Sequence[str], weights: Tensor, blocks: Sequence[str]) -> list[str]:
    """Averaging weights: a column for each block, or a summary of many."""
    if len(blocks) > MOST_BLOCKS:
        columns = ["mean", "smallest", "largest"]
        values = torch.stack([weights.mean(1), weights.amin(1), weights.amax(1)], dim=1)
        title = f"averaging weights over {len(blocks)} blocks"
    else:
        columns, values, title = list(blocks), weights, "averaging weights"
    return [title, *_aligned(["candidate", *columns], names, values.tolist())]


def _aligned(
    header: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[float]]
) -> list[str]:
    names = [printable(name) for name in names]
    left = max(map(len, [header[0], *names]))
    widths = [max(len(column), 8) for column in header[1:]]
    cells = [[column.rjust(w) for column, w in zip(header[1:], widths, strict=True)]]
    cells += [[f"{v:+.4f}".rjust(w) for v, w in zip(row, widths, strict=True)] for row in rows]
    return [
        "  ".join([name.ljust(left), *line])
        for name, line in zip([header[0], *names], cells, strict=True)
    ]


# --- files of candidates


@dataclass(frozen=True)
class _File:
    """What a file of a candidate holds."""

    candidate: str
    tensors: int
    numbers: int
    dtypes: str
    size: int


def describe_candidates(path: Path) -> list[str]:
    """What a candidate's file, or each in a directory, holds, line by line.

    Args:
        path: A safetensors file that this package has written, or a directory of one run's.

    Raises:
        ValueError: Naming the file or directory that holds no candidate.
    """
    files = find_files(path)
    if len(files) == 1 and not path.is_dir():
        file = _read(path)
        return [
            f"candidate: {file.candidate}",
            f"tensors: {file.tensors}, {file.numbers:,} numbers, {file.dtypes}",
            f"size: {_mib(file.size)}",
        ]
    found: list[str] = []
    total = 0
    for name in files:
        try:
            file = _read(name)
        except ValueError as error:
            found.append(f"  {error}")
            continue
        total += file.size
        found.append(
            f"  {file.candidate}: {file.tensors} tensors, {file.numbers:,} numbers, "
            f"{file.dtypes}, {_mib(file.size)}"
        )
    return [f"candidates: {count(len(files), 'file')} ({_mib(total)}) in {path}", *found]


def _read(path: Path) -> _File:
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            own = "candidate" in (file.metadata() or {})
    except Exception as error:  # safetensors raises many types for damaged files
        raise ValueError(f"{path} is no safetensors file that can be read ({error}).") from error
    if not own:
        raise ValueError(f"{path} is no candidate of a run: another program wrote this file.")
    try:
        candidate = decode(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    tensors = [*candidate.parameters.values(), *candidate.buffers.values()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    numbers = sum(tensor.numel() for tensor in tensors)
    return _File(candidate.name, len(tensors), numbers, ", ".join(dtypes), path.stat().st_size)


def is_candidates(path: Path) -> bool:
    """Whether a path is to be read as candidates, and not as a checkpoint."""
    suffix = path.suffix.lower()
    return suffix == SUFFIX or (path.is_dir() and suffix != ".ckpt")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
