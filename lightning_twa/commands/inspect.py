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
    check_name,
    decode,
    find_files,
    load_checkpoint,
    read_file,
    resolve,
)
from lightning_twa.checkpoint import RAW_WEIGHTS, candidate_entries, file_references, read_state
from lightning_twa.commands import provenance
from lightning_twa.commands.provenance import of_checkpoint, of_metadata
from lightning_twa.results import Result, effective_candidates
from lightning_twa.words import count, printable

__all__ = ["describe", "is_candidates"]

MOST_BLOCKS = 6  # columns of the table; more blocks are summed up
STORAGE = "twa_candidates"  # the default storage directory, in the Trainer's default_root_dir
LEVELS = 5  # root/lightning_logs/version_0/checkpoints/last.ckpt is 4 below it


def describe(path: Path, storage: Path | None = None) -> list[str]:
    """What a file is, line by line.

    Args:
        path: A checkpoint of a run; a candidate, or a directory of them; or an average of files.
        storage: The storage directory, where candidates are in files; ``None`` looks for
            ``twa_candidates`` beside the checkpoint and in the directories above.

    Raises:
        ValueError: Naming the file that is nothing of these, or damaged, and what to do.
    """
    if is_candidates(path):
        return _describe_safetensors(path)
    content = load_checkpoint(path, objects=True)
    found = of_checkpoint(content)
    if found is None:
        return [*_describe_weights(path, content), *_describe_run(path, storage)]
    tensors = content.get("state_dict", content)
    held = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
    what = "a Lightning checkpoint" if "state_dict" in content else "a state dict"
    return [f"{path} is {what} with", *provenance.describe(found, held)]


# --- runs


def _describe_weights(path: Path, content: Any) -> list[str]:
    """Which weights a checkpoint of a run holds, and whether its BatchNorm statistics fit them."""
    state = read_state(path)
    weights = content.get("state_dict")
    epoch, step = content.get("epoch"), content.get("global_step")
    known = isinstance(epoch, int) and isinstance(step, int)
    moment = f", in epoch {epoch}, after optimizer step {step}" if known else ""
    lines = [f"{path} is a checkpoint of a run with TWACallback{moment}"]
    phase, temporary = state["phase"], RAW_WEIGHTS in content
    if phase == "collect" and temporary:
        held = "the uniform average of the candidates so far, which was validated"
    elif phase == "collect":
        held = "those of ordinary training; nothing is averaged yet"
    elif phase == "optimize":
        held = f"the average after optimizer step {_steps(state)} of the phase; it goes on"
    else:
        learned = "path" in state and not _is_uniform(state["averaging_weights"])
        held = f"the finished average, {'learned in the phase' if learned else 'uniform'}"
    if phase == "done" and "result" in state and state["result"]["accepted"] is None:
        held = f"the finished average, fixed: {state['result']['start']!r}, chosen by held-out data"
    lines.append(f"weights: {held}")
    if isinstance(weights, Mapping) and provenance.has_statistics(weights):
        lines.append(f"BatchNorm: {_statistics(state, temporary)}")
    return lines


def _is_uniform(weights: Tensor) -> bool:
    """Of a run without a phase, or of one whose phase failed."""
    return bool((weights - 1 / weights.shape[0]).abs().max() < 1e-12)


def _statistics(state: Mapping[str, Any], temporary: bool) -> str:
    """Whether statistics in a checkpoint fit its weights."""
    if state["phase"] == "collect" and not temporary:
        return "statistics of ordinary training, of these weights"
    found = state.get("batchnorm")
    if state["phase"] == "collect" or found is None:
        return "not known whether the statistics are of these weights"
    if found["batches"] is None:
        return "statistics of ordinary training, not re-estimated for the average (stale)"
    over = f"statistics re-estimated over {count(found['batches'], 'training batch')}"
    if state["phase"] == "done":
        return f"{over}, for these weights"
    now = state["started"]["step"] + _steps(state)
    behind = now - found["step"]
    if behind <= 0:
        return f"{over}, for these weights"
    return f"{over} at optimizer step {found['step']}, {count(behind, 'step')} before these weights"


def _describe_run(path: Path, storage: Path | None = None) -> list[str]:
    """Phase, settings, candidates and averaging weights of a checkpoint."""
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
    patterns = state.get("patterns", {})
    lines += [f"{name}: {', '.join(value)}" for name, value in patterns.items() if value]
    running = _running(state) if state["phase"] == "collect" else 0
    also = f", and {count(running, 'running average')} to come" if running else ""
    lines.append(f"candidates: {len(names)}{also}{_where(state)}")
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


def _running(state: Mapping[str, Any]) -> int:
    """Averages over steps that will be candidates at the switch."""
    held = [state["candidates"].get(key, {}) for key in ("averages", "power")]
    numbers = [len(part.get("decays", part.get("widths", []))) for part in held]
    return numbers[0] + (numbers[1] + 1 if numbers[1] else 0)  # and the mean


def _where(state: Mapping[str, Any]) -> str:
    if state["phase"] == "done":
        return "; not in the checkpoint, the phase is finished"
    entries = candidate_entries(state)
    held = [e for e in entries if "files" not in e]
    over_steps = [state["candidates"].get(key, {}) for key in ("averages", "power", "dense")]
    averages = [a for part in over_steps for a in part.get("averages", []) if "files" not in a]
    tensors = {
        t.data_ptr() if t.layout == torch.strided else id(t): t.numel() * t.element_size()
        for part in [*(e[key] for e in held for key in ("parameters", "buffers")), *averages]
        for t in part.values()
    }
    parts = []
    if tensors:
        several = _running(state) if averages else 0
        running = f", {several} of them running averages" if several else ""
        number = len(held) + several
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
    counts = weights.ne(0).any(dim=1).tolist()  # in any block
    none = [name for name, counted in zip(names, counts, strict=True) if not counted]
    if len(none) > 1:
        values = values[torch.tensor(counts)]
        names = [name for name, counted in zip(names, counts, strict=True) if counted]
    lines = [title, *_aligned(["candidate", *columns], names, values.tolist())]
    if len(none) > 1:
        lines.append(f"weight 0: the other {len(none)}, {printable(f'{none[0]} .. {none[-1]}')}")
    return lines


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


def _describe_safetensors(path: Path) -> list[str]:
    """What a candidate's file, or each in a directory, holds; or an average of files."""
    files = find_files(path)
    if len(files) == 1 and not path.is_dir():
        origin = of_metadata(_metadata_of(path))
        if origin is not None:
            held = read_file(path)
            return [f"{path} is a safetensors file with", *provenance.describe(origin, held)]
        file = _read(path)
        return [
            f"candidate: {file.candidate}",
            f"tensors: {file.tensors}, {file.numbers:,} numbers, {file.dtypes}",
            f"size: {_mib(file.size)}",
        ]
    lines: list[str] = []
    read, problems = [], []
    for name in files:
        try:
            read.append(file := _read(name))
        except ValueError as error:
            problems.append(error)
            lines.append(f"  {error}")
            continue
        lines.append(
            f"  {file.candidate}: {file.tensors} tensors, {file.numbers:,} numbers, "
            f"{file.dtypes}, {_mib(file.size)}"
        )
    if not read:
        raise problems[0]
    total = sum(file.size for file in read)
    return [f"candidates: {count(len(read), 'file')} ({_mib(total)}) in {path}", *lines]


def _read(path: Path) -> _File:
    metadata = _metadata_of(path)
    check_name(path, metadata.get("candidate", ""))
    if "candidate" not in metadata:
        raise ValueError(
            f"{path} is no candidate of a run, and no average of files that says so: another "
            f"program wrote this file. Average such files with the command 'average'."
        )
    try:
        candidate = decode(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    tensors = [*candidate.parameters.values(), *candidate.buffers.values()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    numbers = sum(tensor.numel() for tensor in tensors)
    return _File(candidate.name, len(tensors), numbers, ", ".join(dtypes), path.stat().st_size)


def _metadata_of(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except Exception as error:  # safetensors raises many types for damaged files
        raise ValueError(
            f"{path} is no safetensors file that can be read ({error}): it is empty, damaged or "
            f"truncated. Restore it from a copy."
        ) from error


def is_candidates(path: Path) -> bool:
    """Whether a path is to be read as candidates, and not as a checkpoint."""
    suffix = path.suffix.lower()
    return suffix == SUFFIX or (path.is_dir() and suffix != ".ckpt")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
