"""Work that goes on while training does."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

from lightning_twa.candidates.reference import Reference

__all__ = ["Background", "Writing"]

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Does one thing in a thread of its own, which an interpreter that exits waits for.

    Args:
        work: Does it; ``None`` where another process does.
    """

    def __init__(self, work: Callable[[], Result] | None) -> None:
        self._work = work
        self._result: Result | None = None
        self._problem: Exception | None = None
        self._ended = False
        self._thread: Thread | None = None
        if work is not None:
            self._thread = Thread(target=self._run, name="twa-candidate")
            try:
                self._thread.start()
            except RuntimeError:  # no further thread: the limit of the system, or at its exit
                self._thread = None
                self._run()

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._result = self._work()
        except Exception as error:  # of any kind: it is told where somebody waits for it
            self._problem = error
        self._ended = True

    @property
    def done(self) -> bool:
        """Whether nobody has to wait."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[Result | None, Exception | None]:
        """The result, or why there is none; neither where another process does the work."""
        if self._thread is not None:
            self._thread.join()
            if not self._ended:
                self._problem = RuntimeError("this process was forked while it was at work")
        return self._result, self._problem


Writing = Background[Reference]  # of a file: its bytes are on the disk where there is a result
