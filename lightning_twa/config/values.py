"""What a single value may be: checks that name the setting, the value and what it must be."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = [
    "as_epoch",
    "check_choice",
    "check_count",
    "check_device",
    "check_epoch_or_fraction",
    "is_int",
    "is_real",
]


def is_int(value: object) -> bool:
    """True for an integer that is not a bool (``True`` is an ``int`` in Python)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for a finite int or float that is not a bool."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def as_epoch(value: Any) -> Any:
    """4 of 4.0, which jsonargparse may make of 4: to its caches int | float is float | int."""
    whole = isinstance(value, float) and value >= 1.0 and value.is_integer()
    return int(value) if whole else value


def check_epoch_or_fraction(name: str, value: object) -> None:
    """An epoch (int >= 0) or a fraction of ``max_epochs`` (float in [0, 1))."""
    if is_int(value) and value >= 0:  # type: ignore[operator]
        return
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return
    raise ValueError(
        f"Invalid {name}={value!r}. Must be an epoch (int >= 0) "
        f"or a fraction of max_epochs (float in [0, 1))."
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in choices:
        raise ValueError(
            f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, choices))}."
        )


def check_count(name: str, value: object, minimum: int, none_means: str | None = None) -> None:
    """An int that is large enough, or ``None`` where that means something."""
    if none_means is not None and value is None:
        return
    if not (is_int(value) and value >= minimum):  # type: ignore[operator]
        alternative = f", or None ({none_means})" if none_means is not None else ""
        raise ValueError(f"Invalid {name}={value!r}. Must be an int >= {minimum}{alternative}.")


def check_device(name: str, value: object, none_means: str) -> None:
    """What ``torch.device`` takes, or ``None``."""
    if value is None:
        return
    try:
        torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"Invalid {name}={value!r}. Must be a name that torch.device takes ('cpu', 'cuda', "
            f"'cuda:1', ...), or None ({none_means})."
        ) from None
