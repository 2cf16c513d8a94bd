"""The callback for a ``Trainer`` of the package ``pytorch_lightning``: the same code."""

from __future__ import annotations

from pytorch_lightning import Callback

from lightning_twa.callback import TWAHooks

__all__ = ["TWACallback"]


class TWACallback(TWAHooks, Callback):  # type: ignore[misc]
    """For a ``Trainer`` of the package ``pytorch_lightning``."""

    __doc__ = TWAHooks.__doc__
