"""The callback without choosing by held-out data and without power averages, for tests of the rest:
what they count is then what they set. Functions, so that there is one class of that name.
"""

from __future__ import annotations

from typing import Any

import lightning_twa

__all__ = ["CollectConfig", "TWACallback"]


def CollectConfig(**kwargs: Any) -> lightning_twa.CollectConfig:
    """Keeps all snapshots, and no averages of all steps."""
    return lightning_twa.CollectConfig(**{"max_candidates": None, "power_averages": (), **kwargs})


def TWACallback(
    start_epoch: int | float | None = None, *args: Any, **kwargs: Any
) -> lightning_twa.TWACallback:
    """From 0.8 of the run on, without held-out data."""
    if start_epoch is None and kwargs.get("phase_steps") is None:
        start_epoch = 0.8
    kwargs = {"heldout": None, **kwargs}
    if len(args) < 2 and kwargs.get("collect") is None:
        kwargs["collect"] = CollectConfig()
    return lightning_twa.TWACallback(start_epoch, *args, **kwargs)
