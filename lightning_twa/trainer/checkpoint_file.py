"""A Lightning checkpoint of the weights in the model, written beside the others of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["best_paths", "checkpoint_directory", "last_files", "write_weights"]


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


def write_weights(
    trainer: Trainer,
    temporary: Path,
    further: Mapping[str, Any],
    publish: Callable[[Path], Path],
) -> Path | None:
    """Write the model's weights as a Lightning checkpoint, without states of optimizers; every
    process calls it.

    Args:
        trainer: The Trainer.
        temporary: Written to first, the same on every process.
        further: Further entries of the checkpoint.
        publish: Called on rank zero with what was written, gives it its name.

    Returns:
        Where it is, on rank zero.

    Raises:
        OSError: Where the disk is full, or not writable. Nothing is left behind.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    try:
        trainer.strategy.save_checkpoint({**checkpoint, **further}, temporary)
        trainer.strategy.barrier("TWACallback.save_average")
        return publish(temporary) if trainer.is_global_zero else None
    finally:
        if trainer.is_global_zero and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)  # of a sharded model
        elif trainer.is_global_zero and os.path.lexists(temporary):
            temporary.unlink()
