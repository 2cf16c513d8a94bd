"""Long names of tensors in few characters: words in the middle go, numbers stay."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence, Set

__all__ = ["shortened"]

MOST = 32  # characters of a name
CUT = "…"
BETWEEN = " .. "  # of the first and the last tensor of a block


def shortened(names: Sequence[str], most: int = MOST) -> list[str]:
    """Names of at most so many characters, where their numbers leave room for that.

    Words go one after another: those that every name has before others, those before a number last
    of these, and the first ones first. The first word, the last, and every word with a number in it
    stay. What is still too long loses letters within its words. Names that would be the same then
    are given more room.

    Args:
        names: As of modules, ``"encoder.layers.11.attention.query.weight"``, or of the first and
            the last tensor of a block, with ``" .. "`` between them.
        most: Characters.
    """
    halves = [set(half.split(".")) for name in names for half in name.split(BETWEEN)]
    common = set.intersection(*halves) if halves else set()
    longest = max(map(len, names), default=0)
    room = {name: min(most, len(name)) for name in names}
    while True:
        short = {name: _short(name, room[name], common) for name in names}
        seen = Counter(short.values())
        same = [name for name in room if seen[short[name]] > 1 and room[name] < longest]
        if not same:
            return [short[name] for name in names]
        room.update({name: room[name] + 1 for name in same})


def _short(name: str, most: int, common: Set[str]) -> str:
    if len(name) <= most:
        return name
    if BETWEEN in name:
        halves = name.split(BETWEEN, 1)
        return BETWEEN.join(_short(half, (most - len(BETWEEN)) // 2, common) for half in halves)
    words = name.split(".")
    middle = [i for i, word in enumerate(words[1:-1], 1) if not _has_number(word)]
    for i in sorted(middle, key=lambda i: (words[i] not in common, _has_number(words[i + 1]))):
        if len(_joined(words)) <= most:
            break
        words[i] = CUT
    text = _joined(words)
    return text if len(text) <= most else _without_letters(text, most)


def _has_number(word: str) -> bool:
    return any(c.isdigit() for c in word)


def _joined(words: Sequence[str]) -> str:
    return re.sub(f"\\.?{CUT}[{CUT}.]*", CUT, ".".join(words))


def _without_letters(text: str, most: int) -> str:
    """The longest run of letters loses one in its middle until all fit, or none has more than 2."""
    parts = re.split(r"([0-9]+|…|[._ ]+)", text)
    while len("".join(parts)) > most:
        longest = max(range(0, len(parts), 2), key=lambda i: len(parts[i].replace(CUT, "")))
        letters = parts[longest].replace(CUT, "")
        if len(letters) <= 2:
            break
        half = len(letters) // 2
        parts[longest] = f"{letters[:half]}{CUT}{letters[half + 1 :]}"
    return re.sub(f"{CUT}+", CUT, "".join(parts))
