"""A Lightning checkpoint of the weights in the model, written beside the others of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_twa.machine import in_common

__all__ = [
    "best_paths",
    "checkpoint_directory",
    "last_files",
    "wait_for_files",
    "write_checkpoint",
]


def checkpoint_directory(trainer: Trainer) -> Path | None:
    """Where the first checkpoint callback writes, else ``default_root_dir``; ``None`` where
    checkpointing is off.
    """
    if not trainer.checkpoint_callbacks:
        return None
    dirpath = getattr(trainer.checkpoint_callbacks[0], "dirpath", None)
    return Path(dirpath or trainer.default_root_dir)


def best_paths(trainer: Trainer) -> list[tuple[str, Path]]:
    """What ``ckpt_path="best"`` and ``"last"`` may mean."""
    names = ("best_model_path", "last_model_path")
    found = [(n, getattr(c, n, None)) for c in trainer.checkpoint_callbacks for n in names]
    return [(name, Path(path)) for name, path in found if path]


def last_files(trainer: Trainer) -> list[tuple[str, bool]]:
    """The last checkpoints (``save_last``) that were written at this optimizer step, each with
    whether it is of weights alone.
    """
    callbacks: list[Any] = list(trainer.checkpoint_callbacks)
    return [
        (str(c.last_model_path), bool(c.save_weights_only))
        for c in callbacks
        if getattr(c, "last_model_path", "")
        and getattr(c, "_last_global_step_saved", None) == trainer.global_step
        and not os.path.islink(c.last_model_path)
    ]


def write_checkpoint(
    trainer: Trainer,
    temporary: Path,
    publish: Callable[[Path], Path],
    *,
    weights_only: bool,
    further: Mapping[str, Any] | None = None,
) -> Path | None:
    """Write a Lightning checkpoint of what the model holds, completely or not at all; every process
    calls it.

    Args:
        trainer: The Trainer.
        temporary: Written to first, the same on every process.
        publish: Called on rank zero with what was written, gives it its name.
        weights_only: Whether to leave out the states of optimizers, loops and callbacks.
        further: Further entries of the checkpoint.

    Returns:
        Where it is, on rank zero.

    Raises:
        Exception: On every process, where the disk is full, or not writable, or a hook that saves
            fails. Nothing is left behind.
    """
    path: Path | None = None
    try:
        with in_common(OSError):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        with in_common(OSError), _written_at_once(trainer):
            trainer.strategy.save_checkpoint({**checkpoint, **(further or {})}, temporary)
        with in_common(OSError):
            if trainer.is_global_zero:
                path = publish(temporary)
    finally:
        if trainer.is_global_zero and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)  # of a sharded model
        elif trainer.is_global_zero and os.path.lexists(temporary):
            temporary.unlink()
    return path


@contextmanager
def _written_at_once(trainer: Trainer) -> Iterator[None]:
    """Let no thread write a checkpoint later, whose error would end the run."""
    strategy = trainer.strategy
    usual = strategy.checkpoint_io
    if not isinstance(usual, AsyncCheckpointIO) or usual.checkpoint_io is None:
        yield
        return
    strategy.checkpoint_io = usual.checkpoint_io
    try:
        yield
    finally:
        strategy.checkpoint_io = usual


def wait_for_files(trainer: Trainer) -> None:
    """Where a thread writes checkpoints, wait until those that were saved are there."""
    usual = trainer.strategy.checkpoint_io
    if isinstance(usual, AsyncCheckpointIO):
        with suppress(Exception):  # the Trainer's own call of this raises it again
            usual.teardown()
