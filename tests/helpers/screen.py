"""What a person sees in a terminal: a pseudo-terminal, and as much of one as bars need."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any

from lightning_utilities.core import rank_zero

COLUMNS, LINES = 120, 40
CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Screen:
    """Lines of text as they stand after everything that was written. Nothing scrolls away."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.text = ""  # everything that was written

    def feed(self, text: str) -> None:
        self.text += text
        position = 0
        while position < len(text):
            code = CODE.match(text, position)
            if code is not None:
                self._control(code[1], code[2])
                position = code.end()
                continue
            self._put(text[position])
            position += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row += 1
        elif character == "\r":
            self.column = 0
        elif character.isprintable():
            if self.column == COLUMNS:
                self.row, self.column = self.row + 1, 0
            line = self._line()
            line += " " * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1
        self._line()

    def _control(self, numbers: str, letter: str) -> None:
        number = int(numbers) if numbers.isdigit() else None
        if letter == "A":
            self.row = max(0, self.row - (number or 1))
        elif letter == "B":
            self.row += number or 1
        elif letter == "K":
            line = self._line()
            del line[0 if number == 2 else self.column :]

    def _line(self) -> list[str]:
        while len(self.lines) <= self.row:
            self.lines.append([])
        return self.lines[self.row]

    @property
    def rows(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


@contextlib.contextmanager
def terminal(monkeypatch: Any, *, errors: Any = None) -> Iterator[Screen]:
    """``sys.stdout`` and ``sys.stderr`` are a terminal, and the logger of Lightning, that of the
    package that was imported last, has a handler for the latter, as where nobody configures one.

    Args:
        monkeypatch: Of the test.
        errors: A file that ``sys.stderr`` is instead.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    settings = termios.tcgetattr(slave)
    settings[1] &= ~termios.OPOST  # a line's end stays what it is
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    for name, value in (("COLUMNS", COLUMNS), ("LINES", LINES), ("TERM", "xterm")):
        monkeypatch.setenv(name, str(value))
    received: list[bytes] = []
    reader = threading.Thread(target=_read, args=(master, received))
    reader.start()
    screen, logger = Screen(), rank_zero.log
    out = os.fdopen(os.dup(slave), "w", buffering=1)
    err = errors or os.fdopen(os.dup(slave), "w", buffering=1)
    handler = logging.StreamHandler(err)
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            yield screen
    finally:
        logger.removeHandler(handler)
        for file in {out, err} - {errors}:
            file.close()
        os.close(slave)
        reader.join()
        os.close(master)
        screen.feed(b"".join(received).decode().replace("\r\n", "\n").replace("\n", "\r\n"))


def _read(master: int, received: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # there is no writer any more
        while data := os.read(master, 4096):
            received.append(data)
