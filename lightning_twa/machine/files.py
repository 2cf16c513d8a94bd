"""Whether files can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["why_not_writable"]


def why_not_writable(directory: Path) -> str | None:
    """Why no file can be written into a directory, which need not be there yet; ``None`` where that
    works. It is tried, since permissions do not tell of read-only and special file systems, nor of
    the superuser; nothing is left behind.
    """
    whole = directory.absolute()
    nearest = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".twa-", dir=nearest))
    except OSError as error:
        return f"{error.strerror or error}: {nearest}"
    return None
