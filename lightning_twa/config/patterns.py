"""Patterns of names: which parameters are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

__all__ = ["check_patterns", "is_selected", "matches"]


@lru_cache(maxsize=2**16)
def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is of a name: the whole of it, or a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_selected(
    names: Iterable[str], include: tuple[str, ...] | None, exclude: tuple[str, ...]
) -> bool:
    """Whether a tensor is averaged.

    Args:
        names: All that it has: tied tensors have several.
        include: Patterns, of which one must match; ``None`` for all.
        exclude: Patterns, of which none may match.
    """
    known = list(names)
    included = include is None or any(matches(n, p) for n in known for p in include)
    return included and not any(matches(n, p) for n in known for p in exclude)


def check_patterns(name: str, value: Any, none_means: str | None = None) -> None:
    """
    Raises:
        ValueError: When a value is no tuple of patterns.
    """
    if none_means is not None and value is None:
        return
    fine = isinstance(value, tuple) and all(isinstance(p, str) and p for p in value)
    if not fine or (none_means is not None and not value):
        other = "" if none_means is None else f", or None ({none_means})"
        raise ValueError(
            f"Invalid {name}={value!r}. Must be a pattern of names of parameters, such as "
            f"'head' or '*.bias', or a list of them{other}."
        )
