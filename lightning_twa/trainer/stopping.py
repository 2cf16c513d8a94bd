"""What ``EarlyStopping`` wants while candidates are collected, and its sleep in the phase: it would
compare averages, which a warm-up has only begun to move, with the best raw weights.

``tests/trainer/test_private_names.py`` says when a Lightning release changes the method that is
watched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Trainer

from lightning_twa.trainer.features import callbacks, is_a

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import EarlyStopping

__all__ = ["StopWatch", "begin_stopping_anew", "put_to_sleep", "was_stopped_early"]


class StopWatch:
    """Takes note of ``EarlyStopping`` wanting to end a run, and lets the run go on.

    Other reasons to stop (``max_time``, signals, a user's own callback) stop the run as ever.

    Args:
        trainer: The Trainer.
        wanted: Whether the phase could begin after this epoch; else the run stops as ever.
    """

    def __init__(self, trainer: Trainer, wanted: Callable[[], bool]) -> None:
        self.stopped = False
        self._callbacks = _early_stopping(trainer)
        for callback in self._callbacks:
            callback._run_early_stopping_check = partial(self._check, callback, wanted)  # type: ignore[method-assign]

    def _check(self, callback: EarlyStopping, wanted: Callable[[], bool], trainer: Trainer) -> None:
        before = trainer.should_stop
        type(callback)._run_early_stopping_check(callback, trainer)
        if trainer.should_stop and not before and wanted():
            self.stopped = True
            trainer.should_stop = False

    def release(self) -> None:
        """Let callbacks stop the run again. May be called again."""
        for callback in self._callbacks:
            del callback._run_early_stopping_check
        self._callbacks = []


def put_to_sleep(trainer: Trainer) -> Callable[[], None]:
    """Let ``EarlyStopping`` decide nothing, and keep what it has.

    Returns:
        What wakes it.
    """
    asleep = _early_stopping(trainer)
    for callback in asleep:
        callback._run_early_stopping_check = _decide_nothing  # type: ignore[method-assign]

    def wake() -> None:
        for callback in asleep:
            vars(callback).pop("_run_early_stopping_check", None)

    return wake


def _decide_nothing(trainer: Trainer) -> None: ...


def begin_stopping_anew(trainer: Trainer) -> None:
    """Let ``EarlyStopping`` wait as long as at the start of a run, for what is best from now on."""
    for callback in _early_stopping(trainer):
        callback.wait_count = 0
        worst = torch.inf if callback.mode == "min" else -torch.inf
        callback.best_score = torch.tensor(worst, device="cpu")


def was_stopped_early(trainer: Trainer) -> bool:
    """Whether ``EarlyStopping`` has ended the run."""
    return any(callback.stopped_epoch > 0 for callback in _early_stopping(trainer))


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    found = [c for c in callbacks(trainer) if is_a(c, "EarlyStopping")]
    return cast("list[EarlyStopping]", found)
