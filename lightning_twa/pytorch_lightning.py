"""The callback for a ``Trainer`` of the package ``pytorch_lightning``: the same code."""

from __future__ import annotations

import logging

from lightning_utilities.core import rank_zero
from pytorch_lightning import Callback

from lightning_twa.callback import TWAHooks

__all__ = ["TWACallback"]

# Either package makes its logger that of all messages when it is imported, and the last one wins:
# here it is the user's, also where it was imported before this one.
rank_zero.log = logging.getLogger("pytorch_lightning.utilities.rank_zero")


class TWACallback(TWAHooks, Callback):  # type: ignore[misc]
    """For a ``Trainer`` of the package ``pytorch_lightning``."""

    __doc__ = TWAHooks.__doc__
