"""Values as people write them: of YAML, of Hydra's omegaconf, of numpy; made into the ones that are
meant before they are checked. What cannot be one of these is left as it is, for the check to name.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["as_config", "as_names", "read_fields"]

Config = TypeVar("Config")
NOTHING = ("null", "none", "~")  # as YAML, jsonargparse and Python write it
WORDS = {"true": True, "false": False}


def read_fields(config: Any) -> None:
    """In ``__post_init__`` of a frozen dataclass, first: read each value by the type of its field.

    A number may be a string (``1e-3`` is one in YAML) or numpy's, ``None`` may be ``"null"``, a
    tuple any sequence or its text.
    """
    for name, kinds in _kinds_of(type(config)).items():
        before = getattr(config, name)
        after = _read(before, kinds)
        if after is not before:
            object.__setattr__(config, name, after)


def as_config(name: str, value: Any, kind: type[Config]) -> Config:
    """A configuration of a mapping of its arguments, or of ``None``.

    Args:
        name: Of the argument, for errors.
        value: The configuration, a mapping, or ``None``, which is the default one.
        kind: Its class.

    Raises:
        TypeError: When it is something else, or naming an argument that there is not.
        ValueError: From the configuration.
    """
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name}={value!r} must be a {kind.__name__}(...), a mapping of its arguments "
            f"({', '.join(known)}), or None."
        )
    given = dict(value)
    given.pop("_target_", None)  # of Hydra, where it does not instantiate what is within
    if set(given) <= {"class_path", "init_args"} and given:  # of jsonargparse
        given = dict(given.get("init_args") or {})
    unknown = [key for key in given if key not in known]
    if unknown:
        raise TypeError(
            f"{name}={dict(value)!r}: {kind.__name__} has no argument {unknown[0]!r}. It has "
            f"{', '.join(known)}."
        )
    return kind(**given)


def as_names(value: Any) -> Any:
    """A tuple of one name or of several; what is neither, as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else value


def _kinds_of(config: type) -> dict[str, tuple[Any, ...]]:
    """What the values of each field may be, ``Literal`` and tuples with their arguments."""
    hints = get_type_hints(config)
    return {f.name: _alternatives(hints[f.name]) for f in fields(config)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _read(value: Any, kinds: tuple[Any, ...]) -> Any:
    if value is None or isinstance(value, (bool, os.PathLike)):
        return value
    if isinstance(value, str):
        return _read_text(value, kinds)
    if isinstance(value, Real):  # numpy's are these too
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        for kind in kinds:
            if get_origin(kind) is tuple:
                within = _alternatives(get_args(kind)[0])
                return tuple(_read(part, within) for part in value)
        if any(get_origin(kind) is not None and get_origin(kind) is not Literal for kind in kinds):
            return list(value)
    return value


def _read_text(text: str, kinds: tuple[Any, ...]) -> Any:
    words = [w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)]
    lower = text.strip().lower()
    if text in words:
        return text
    if bool in kinds and lower in WORDS:
        return WORDS[lower]
    if str in kinds:
        return text
    if type(None) in kinds and lower in NOTHING:
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    tuples = [kind for kind in kinds if get_origin(kind) is tuple]
    if tuples:
        try:
            parts = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            return text
        return _read(parts if isinstance(parts, (tuple, list)) else (parts,), tuple(tuples))
    return text
