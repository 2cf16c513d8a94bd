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


def check_epoch_or_fraction(name: str, value: object, none_means: str) -> None:
    """An epoch (int >= 0) or a fraction of ``max_epochs`` (float in [0, 1)), or ``None``."""
    if value is None:
        return
    if is_int(value) and value >= 0:  # type: ignore[operator]
        return
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return
    raise ValueError(
        f"Invalid {name}={value!r}. Must be an epoch (int >= 0), "
        f"a fraction of max_epochs (float in [0, 1)), or None ({none_means})."
    )


def check_choice(
    name: str, value: object, choices: tuple[str, ...], none_means: str | None = None
) -> None:
    """One of some words, or ``None`` where that means something."""
    if none_means is not None and value is None:
        return
    if not isinstance(value, str) or value not in choices:
        words = f"one of {', '.join(map(repr, choices))}"
        words += "" if none_means is None else f", or None ({none_means})"
        raise ValueError(f"Invalid {name}={value!r}. Must be {words}.")


def check_count(
    name: str,
    value: object,
    minimum: int,
    none_means: str | None = None,
    words: tuple[str, ...] = (),
) -> None:
    """An int that is large enough, one of some words, or ``None`` where that means something."""
    if (none_means is not None and value is None) or (isinstance(value, str) and value in words):
        return
    if not (is_int(value) and value >= minimum):  # type: ignore[operator]
        alternative = "".join(f", {word!r}" for word in words)
        alternative += f", or None ({none_means})" if none_means is not None else ""
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
