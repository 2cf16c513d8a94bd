"""Numbers and names in words."""

from __future__ import annotations

__all__ = ["count", "printable", "size"]


def count(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``, ``2 batches``."""
    ending = "" if number == 1 else "es" if noun.endswith("batch") else "s"
    return f"{number} {noun}{ending}"


def size(number: int) -> str:
    """``3.4 MiB``, ``1.2 GiB``."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def printable(text: str) -> str:
    """The text with what could move the cursor or change colours as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
