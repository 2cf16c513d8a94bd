"""Which files are meant: paths, patterns, and directories, of candidates or of shards."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_twa.candidates.frozen import FROZEN
from lightning_twa.candidates.reference import SUFFIX
from lightning_twa.candidates.shards import find_index, index_of, is_index, shards_of

__all__ = ["RANK", "WHOLE", "check_file", "check_name", "find_files", "unique_names"]

_Item = str | os.PathLike[str]

RANK = re.compile(r"rank_[0-9]+_of_[0-9]+")  # directory of one process's part
WHOLE = "Give a file with the whole weights: save the state dict gathered on one process."

SUBSPACE = re.compile(r"subspace-[0-9a-f]{32}")  # stem of a phase's file; see subspace_files
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", SUFFIX)
_ALONE = "model.safetensors"  # of Hugging Face's libraries, where it is one file


def find_files(checkpoints: _Item | Sequence[_Item]) -> list[Path]:
    """The files that paths, patterns and directories of candidates name, in order, each once.

    Args:
        checkpoints: One item or several. An item is a file; a pattern (``**`` goes into
            directories), whose files come in natural order (``epoch=2`` before ``epoch=10``); or
            a directory of a run's candidates, or of a checkpoint of Hugging Face's libraries,
            which is one candidate in however many files. ``~`` is the home directory. A path
            that exists is never a pattern.

    Returns:
        The files; an index for those that it lists.

    Raises:
        ValueError: Naming the item that gives no file, or one of another kind.
    """
    items = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    if not isinstance(items, Sequence) or isinstance(items, bytes) or not items:
        raise ValueError(
            f"checkpoints is {items!r}. Give a path, a pattern, a directory, or a list of them."
        )
    found: dict[Path, Path] = {}
    for item in items:
        for path in _expanded(item):
            path = index_of(path) or path
            check_file(path)
            found.setdefault(path.resolve(), path)
    return list(found.values())


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Names for candidates: the stem, or the directory of an index, or as much of the path before
    it as tells it from others.

    Returns:
        ``"last"``, or ``"run_1/last"`` and ``"run_2/last"``; with a suffix if all else is equal.

    Raises:
        ValueError: Naming a path that is there twice.
    """
    options = []
    for path in map(Path.absolute, paths):
        short = path.parent if is_index(path) else path.with_suffix("")
        tails = [
            "/".join(p.parts[k:]) for p in (short, path) for k in range(len(p.parts) - 1, 0, -1)
        ]
        options.append(list(dict.fromkeys(tails)))
    counts = Counter(name for tails in options for name in tails)
    unique = [[name for name in tails if counts[name] == 1] for tails in options]
    if not all(unique):
        raise ValueError(f"{paths[unique.index([])]} is given twice. Give each file once.")
    return [names[0] for names in unique]


def _expanded(item: Any) -> list[Path]:
    text = os.path.expanduser(os.fspath(item)) if isinstance(item, str | os.PathLike) else ""
    if not isinstance(text, str) or not text:
        raise ValueError(f"checkpoints has the item {item!r}. An item is a str or a Path.")
    if os.path.isdir(text):
        return _in_directory(Path(text))
    if os.path.lexists(text) or not any(sign in text for sign in "*?["):
        return [Path(text)]
    matches = [Path(match) for match in glob.glob(text, recursive=True)]
    # A directory like epoch=3.ckpt is a sharded checkpoint, to be refused and not left out
    files = [p for p in matches if not p.is_dir() or p.suffix.lower() in _SUFFIXES]
    weights = [p for p in files if not SUBSPACE.fullmatch(p.stem)]
    files = weights or files  # which are refused, where there are no others
    files += [whole for p in matches if p.is_dir() and (whole := _whole_in(p)) is not None]
    if not files:
        raise ValueError(f"The pattern {str(item)!r} matches no file. Check it, and the directory.")
    return sorted(files, key=_natural)


def _whole_in(directory: Path) -> Path | None:
    """The file of a Hugging Face checkpoint in its directory, or its index."""
    alone = directory / _ALONE
    return find_index(directory) or (alone if alone.is_file() else None)


def check_file(path: Path) -> None:
    """Check that a path is a file whose name says that it holds weights.

    Raises:
        ValueError: Naming the path, and what to do.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory, as of a sharded checkpoint. {WHOLE}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is no regular file. Check the path.")
    check_name(path, path.stem)
    if is_index(path):
        shards_of(path)
    elif path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}. Files with weights end in "
            f"{', '.join(_SUFFIXES)}: rename it, or narrow the pattern."
        )


def check_name(path: Path, name: str) -> None:
    """Check that a file, by a name of it, is no subspace of a phase.

    Raises:
        ValueError: Naming the path, and what to do.
    """
    if SUBSPACE.fullmatch(name):
        raise ValueError(
            f"{path} holds the subspace of a phase, for resuming in it "
            f"(StorageConfig.cache_subspace), and no weights. Name files of candidates."
        )


def _in_directory(directory: Path) -> list[Path]:
    """The index of a checkpoint in parts, or a run's candidates in a directory of its store."""
    index = find_index(directory)
    if index is not None:
        return [index]
    folders = sorted((p for p in directory.iterdir() if p.is_dir()), key=_natural)
    if any(RANK.fullmatch(folder.name) for folder in (directory.resolve(), *folders)):
        raise ValueError(f"{directory} has candidates with sharded parameters. {WHOLE}")
    files = [p for p in directory.glob(f"*{SUFFIX}") if p.is_file() and p.stem != FROZEN]
    for path in files:
        check_name(path, path.stem)
    if not files:
        inner = [
            folder.name
            for folder in folders
            if not all(SUBSPACE.fullmatch(p.stem) for p in folder.glob(f"*{SUFFIX}"))
        ]
        if inner:
            raise ValueError(
                f"{directory} holds the candidates of {len(inner)} run(s), one directory each. "
                f"Name one of them, such as {directory / inner[-1]}."
            )
        others = sorted((p for p in directory.iterdir() if _is_checkpoint(p)), key=_natural)
        if others:
            suffix = others[-1].suffix
            raise ValueError(
                f"{directory} holds no candidates, but {len(others)} checkpoint file(s). Name them "
                f"by a pattern, {str(directory / f'*{suffix}')!r}, or one of them, such as "
                f"{others[-1]}."
            )
        raise ValueError(
            f"{directory} holds no candidates ({SUFFIX} files). Name a directory that does, or for "
            f"checkpoints a pattern (*.ckpt). A sharded checkpoint is not read: {WHOLE}"
        )
    return sorted(files, key=_natural)


def _is_checkpoint(path: Path) -> bool:
    return path.suffix.lower() in (".ckpt", ".pt", ".pth") and path.is_file()


def _natural(path: Path) -> tuple[list[list[str | int]], str]:
    """A key that compares runs of digits as numbers, one part of a path after the other."""
    parts = [re.split(r"([0-9]+)", part) for part in path.parts]
    return [[int(x) if k % 2 else x for k, x in enumerate(part)] for part in parts], str(path)
