"""A file that is written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from lightning_twa.candidates.reference import Reference

__all__ = ["Writing"]


class Writing:
    """Writes one file in a thread of its own, which an interpreter that exits waits for.

    Args:
        write: Writes it; ``None`` where another process does.
    """

    def __init__(self, write: Callable[[], Reference] | None) -> None:
        self._write = write
        self._written: Reference | None = None
        self._problem: Exception | None = None
        self._thread: Thread | None = None
        if write is not None:
            self._thread = Thread(target=self._run, name="twa-candidate")
            try:
                self._thread.start()
            except RuntimeError:  # no further thread: the limit of the system, or at its exit
                self._thread = None
                self._run()

    def _run(self) -> None:
        assert self._write is not None
        try:
            self._written = self._write()
        except Exception as error:  # of any kind: it is told where somebody waits for it
            self._problem = error

    @property
    def done(self) -> bool:
        """Whether nobody has to wait."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[Reference | None, Exception | None]:
        """The file once its bytes are on the disk, or why it could not be written; neither where
        another process writes it.
        """
        if self._thread is not None:
            self._thread.join()
            if self._written is None and self._problem is None:
                self._problem = RuntimeError("this process was forked while it was written")
        return self._written, self._problem
