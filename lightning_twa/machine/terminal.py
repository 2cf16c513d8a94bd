"""What a run says: each line once, whole, and above whatever bars a terminal shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["say", "warn"]

CALLER = 6  # frames up from where Lightning's functions emit, past theirs and ours


@rank_zero_only
def say(text: str) -> None:
    """Log a line on rank zero, to whatever the logger of Lightning has for handlers.

    Args:
        text: Of one line, or more.
    """
    with _above_bars():
        rank_zero_info(text, stacklevel=CALLER)


@rank_zero_only
def warn(text: str) -> None:
    """Warn on rank zero.

    Args:
        text: What is so, why, and what to do, in that order.
    """
    with _above_bars():
        rank_zero_warn(text, stacklevel=CALLER)


@contextmanager
def _above_bars() -> Iterator[None]:
    with ExitStack() as stack:
        _hide_bars_of_tqdm(stack)
        _write_through_rich(stack)
        yield


def _hide_bars_of_tqdm(stack: ExitStack) -> None:
    """A bar stands on the line that it was drawn on, without an end of line."""
    bars: list[Any] = [bar for bar in list(getattr(tqdm, "_instances", ())) if not bar.disable]
    if not bars:  # without any, its lock is left alone: forked processes share it
        return
    stack.enter_context(tqdm.external_write_mode())
    for bar in bars:
        if not bar.gui and not bar.fp.isatty():
            bar.fp.write("\n")  # a file keeps what was drawn
        bar.fp.flush()


def _write_through_rich(stack: ExitStack) -> None:
    """While Rich shows bars, ``sys.stderr`` prints above them. Handlers of the logger hold the
    terminal behind it, which it had before: what they write there would be drawn over.
    """
    above = sys.stderr
    if not hasattr(above, "rich_proxied_file"):
        return
    for handler in _handlers(rank_zero.log):
        if isinstance(handler, logging.StreamHandler) and handler.stream is not above:
            stream = handler.stream
            if stream.isatty():
                stack.callback(handler.setStream, stream)
                handler.setStream(above)


def _handlers(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None
