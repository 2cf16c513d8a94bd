"""Writes an average of files to a file: a state dict, safetensors, or a Lightning checkpoint."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_twa.candidates import load_checkpoint
from lightning_twa.checkpoint import RAW_WEIGHTS

__all__ = ["SUFFIXES", "check_free", "write_average"]

# What is left out of a checkpoint whose weights are replaced: it belongs to other weights.
STALE = (
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "MixedPrecision",
    "AMP",
    RAW_WEIGHTS,
    "averaging_state",  # of Lightning's WeightAveraging
)
SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")


def check_free(output: Path, force: bool) -> None:
    """Check that a file can be written, before the work that it takes.

    Raises:
        ValueError: When its directory is missing, or its name is taken.
    """
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent} is no directory. Make it first, or write elsewhere.")
    if output.is_dir():
        raise ValueError(f"{output} is a directory. Give the name of a file.")
    if os.path.lexists(output) and not force:
        raise ValueError(f"{output} exists. Use --force to replace it.")


def write_average(output: Path, newest: Path, state: dict[str, Tensor], force: bool) -> None:
    """Write the average to the file, completely or not at all."""
    content = _as_checkpoint(newest, state) if output.suffix == ".ckpt" else state
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if output.suffix != ".safetensors":
                torch.save(content, file)
        if output.suffix == ".safetensors":
            # of its own memory each: the format has no tensors that share it
            tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
            save_file(tensors, temporary, metadata={"format": "pt"})
            os.chmod(temporary, mode)  # safetensors 0.8 leaves it to the owner alone
        check_free(output, force)
        os.replace(temporary, output)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(f"{output} could not be written ({error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _as_checkpoint(newest: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The newest checkpoint with other weights, without what belongs to its own."""
    checkpoint = load_checkpoint(newest) if newest.suffix == ".ckpt" else None
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"{newest} is no Lightning checkpoint, so the average cannot be one. Write a .pt or "
            f".safetensors file."
        )
    kept = {key: value for key, value in checkpoint.items() if key not in STALE}
    # Extra state of modules is no tensor, and has no average
    return {**kept, "state_dict": {**checkpoint["state_dict"], **state}}
