"""Writes an average of files to a file: a state dict, safetensors, or a Lightning checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_twa.average import average, factors, mode_of
from lightning_twa.candidates import decay_curve, find_files, load_checkpoint
from lightning_twa.checkpoint import RAW_WEIGHTS
from lightning_twa.commands.model import load_setting, with_statistics
from lightning_twa.commands.power import power_members
from lightning_twa.commands.provenance import (
    KEY,
    average_in_words,
    has_statistics,
    provenance,
    statistics_in_words,
)
from lightning_twa.words import count

__all__ = ["SUFFIXES", "average_files"]

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


def average_files(args: argparse.Namespace, weights: list[float] | None) -> Iterator[str]:
    """Average files into one; what was written, line by line.

    Args:
        args: Of the command, whose options go together.
        weights: Of each file, of ``--method weights``.

    Raises:
        ValueError: Naming the file or the option, and what to do.
        OSError: Where the file cannot be written.
    """
    output: Path = args.output
    check_free(output, args.force)
    used = find_files(args.files)[-(args.last or 0) :]
    if weights is not None and len(weights) != len(used):
        numbers, files = count(len(weights), "number"), count(len(used), "file")
        args.parser.error(f"--weights has {numbers}, but {files} to be averaged: give one for each")
    if args.method == "greedy":
        mode_of(args.monitor, args.mode)  # before the files are read
    setting = None
    if args.config is not None or args.module is not None:
        setting = load_setting(args.config, args.module, args.data, used[-1])
    given = {
        "decay": args.decay,
        "anchor": args.anchor,
        "include": args.filter,
        "exclude": args.exclude,
        "monitor": args.monitor,
        "mode": args.mode,
        "lora": None if args.lora == "factors" else args.lora,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    scored: dict[str, Any] = {}
    if setting is not None and args.method == "greedy":
        own = type(setting.module).val_dataloader
        if setting.data is None and own is LightningModule.val_dataloader:
            raise ValueError(
                f"--method greedy validates, but {type(setting.module).__name__} has no "
                f"val_dataloader. Pass --data, or a --config that names the data."
            )
        scored = {
            "module": setting.module,
            "trainer": setting.trainer(),
            "dataloaders": setting.data,
        }
    if args.method == "power":
        if len(used) > 1:
            args.parser.error(f"--method power is of one checkpoint of a run, not {len(used)}")
        members, shares_of_them = power_members(used[0], args.sigma_rel)
        state = average(members, "weights", weights=shares_of_them, **options)
        options["sigma_rel"] = args.sigma_rel
    else:
        paths = [str(file) for file in used]
        state = average(paths, args.method, weights=weights, **options, **scored)
    statistics: dict[str, Any] | None = None
    if has_statistics(state):
        statistics = {"batches": None}
        if setting is not None:
            state, statistics["batches"] = with_statistics(setting, state, args.batches)
    shares = _weights(args, len(used), weights)
    origin = provenance(used, args.method, options, shares, statistics)
    write_average(output, used[-1], state, origin, args.force)
    names = origin["files"]
    which = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} .. {names[-1]}"
    yield f"wrote {output}: {average_in_words(args.method)} {which}"
    if statistics is not None and (len(used) > 1 or args.method == "power"):
        yield f"BatchNorm: {statistics_in_words(statistics, len(used), args.method)}"
        if statistics["batches"] is None:
            yield (
                "  pass --config config.yaml of LightningCLI, or --module and --data, to "
                "re-estimate them; or call torch.optim.swa_utils.update_bn before you use it"
            )


def _weights(
    args: argparse.Namespace, n: int, weights: list[float] | None
) -> Sequence[float] | None:
    """Of each file, where they do not depend on what is in it."""
    if args.method == "wsm":
        return decay_curve(n)
    if args.method in ("uniform", "ema", "weights"):
        return factors(n, args.decay, weights)
    return None


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


def write_average(
    output: Path, newest: Path, state: dict[str, Tensor], origin: dict[str, Any], force: bool
) -> None:
    """Write the average to the file, completely or not at all.

    Args:
        output: The file.
        newest: Whose content a checkpoint gets beside the average.
        state: The average.
        origin: What the file is to say of it; see :mod:`lightning_twa.commands.provenance`.
        force: Whether a file may be replaced.
    """
    content: dict[str, Any]
    if output.suffix == ".ckpt":
        content = {**_as_checkpoint(newest, state), KEY: origin}
    else:
        content = OrderedDict(state)
        # where module.state_dict() has its versions: it is saved too
        content._metadata = {KEY: origin}  # type: ignore[attr-defined]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if output.suffix != ".safetensors":
                torch.save(content, file)
        if output.suffix == ".safetensors":
            # of its own memory each: the format has no tensors that share it
            tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
            save_file(tensors, temporary, metadata={"format": "pt", KEY: json.dumps(origin)})
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
