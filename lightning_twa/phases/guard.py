"""What fails in a step of the phase: the user's code, which ends the run as ever, or ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_twa.machine import CommonError, world_size
from lightning_twa.subspace import SubspaceOptimizer

__all__ = ["guard_step", "is_common", "raise_what_failed"]

FAILURE = "_twa_failure"  # attribute of an optimizer


def is_common(error: Exception) -> bool:
    """Whether every rank has this error, so that all may go on without what has failed. A warning
    that somebody has made an error of is to end the run.
    """
    common = world_size() == 1 or isinstance(error, CommonError)
    return common and not isinstance(error, Warning)


def guard_step(optimizer: SubspaceOptimizer) -> None:
    """Let a step that fails by its own work, and not in the closure, return as if nothing had been;
    see :func:`raise_what_failed`. The Trainer would end the run.

    Args:
        optimizer: Of the phase; its ``step`` is replaced.
    """
    step = optimizer.step

    def guarded(closure: Callable[[], Any] | None = None) -> Any:
        of_user: list[BaseException] = []
        losses: list[Any] = []

        def watched() -> Any:
            assert closure is not None
            try:
                losses.append(closure())
            except BaseException as error:
                of_user.append(error)
                raise
            return losses[-1]

        try:
            return step(None if closure is None else watched)
        except Exception as error:
            if of_user or not is_common(error):
                raise
            setattr(optimizer, FAILURE, error)
            return losses[0] if losses else None

    optimizer.step = guarded  # type: ignore[method-assign]


def raise_what_failed(optimizer: SubspaceOptimizer | None, *, waits: bool) -> None:
    """After a step: raise what it has failed with, if it has.

    Args:
        optimizer: Of the phase.
        waits: Whether to wait for an accelerator, which alone knows of other processes' steps, and
            of gradients that are not finite.
    """
    failure = getattr(optimizer, FAILURE, None)
    if failure is not None:
        raise failure
    if waits and optimizer is not None:
        optimizer.look()
