"""Checkpoints in several files with an index, as Hugging Face's libraries write big models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

__all__ = ["find_index", "index_of", "is_index", "read_shards", "shards_of"]

_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_SHARD = re.compile(r"(.+)-[0-9]+-of-[0-9]+\.(safetensors|bin)")


def is_index(path: Path) -> bool:
    """Whether a path is named as an index is, like ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(path.name) is not None


def find_index(directory: Path) -> Path | None:
    """The index in a directory, of safetensors before others; ``None`` where it has none.

    Raises:
        ValueError: Naming several.
    """
    found = sorted(path for path in directory.iterdir() if is_index(path))
    found = [path for path in found if ".safetensors." in path.name] or found
    if len(found) > 1:
        raise ValueError(
            f"{directory} holds several checkpoints, {', '.join(p.name for p in found)}. Name one "
            f"of these files."
        )
    return found[0] if found else None


def index_of(shard: Path) -> Path | None:
    """The index that lists a file; ``None`` where its name is no shard's.

    Raises:
        ValueError: Naming a shard that no index lists.
    """
    match = _SHARD.fullmatch(shard.name)
    if match is None or not shard.is_file():
        return None
    indexes = sorted(path for path in shard.parent.iterdir() if is_index(path))
    for index in indexes:
        if shard.name in shards_of(index).values():
            return index
    raise ValueError(
        f"{shard} is one part of a checkpoint whose index is missing in its directory "
        f"({match[1]}.{match[2]}.index.json). Copy it there, or give a file with the whole weights."
    )


def shards_of(index: Path) -> dict[str, str]:
    """Names of tensors with the file of each, which are all there.

    Raises:
        ValueError: Naming an index that is damaged, or the file that is missing.
    """
    try:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(shards.values()))
        plain = bool(names) and all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of a checkpoint that can be read ({type(error).__name__}: "
            f"{error}). Restore it from a copy."
        ) from error
    if not plain:
        raise ValueError(f"{index} lists {names[:3]}, which are no files beside it. Restore it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent / missing[0]} is missing, one of {len(names)} parts of the checkpoint "
            f"that {index.name} lists ({len(missing)} "
            f"of them missing). Copy what is missing there."
        )
    return shards


def read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts.

    Args:
        index: See :func:`is_index`.
        read: Reads one part.

    Raises:
        ValueError: Naming the part that is missing or damaged, or a tensor that is not in its part.
    """
    shards = shards_of(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        held = read(index.parent / name)
        lost = [tensor for tensor, file in shards.items() if file == name and tensor not in held]
        if lost:
            raise ValueError(
                f"{index.parent / name} has no tensor {lost[0]!r}, which {index.name} says it has: "
                f"they are of different checkpoints. Restore them from a copy."
            )
        tensors |= held
    return tensors
