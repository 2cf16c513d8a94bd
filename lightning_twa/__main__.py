"""``python -m lightning_twa``: look into checkpoints, average files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_twa.average import average
from lightning_twa.candidates.readers import find_files, load_checkpoint
from lightning_twa.checkpoints import read_state
from lightning_twa.plots import plot_averaging_weights
from lightning_twa.report import effective_candidates

MOST_BLOCKS = 6  # columns of the table; more blocks are summed up
# What is left out of a checkpoint whose weights are replaced: it belongs to other weights.
STALE = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "MixedPrecision", "AMP")
SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_twa", description="Trainable Weight Averaging for Lightning."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser(
        "inspect",
        help="print what a checkpoint holds of TWA",
        description="Print the candidates of a checkpoint, their averaging weights and the phase's "
        "settings. Reads that file alone, and no Python objects in it.",
    )
    inspect.add_argument("checkpoint", type=Path, help="a Lightning checkpoint")
    inspect.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the averaging weights (.png, .pdf)"
    )
    inspect.set_defaults(run=_inspect)

    mean = commands.add_parser(
        "average",
        help="average checkpoint files",
        description="Average files with weights that are not learned, oldest first. BatchNorm "
        "statistics are averaged too, and do not fit the average: compute them anew.",
    )
    mean.add_argument(
        "files", nargs="+", help="checkpoints, state dicts, safetensors, or quoted patterns"
    )
    mean.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    mean.add_argument("--method", choices=("uniform", "ema", "weights"), default="uniform")
    mean.add_argument("--last", type=int, metavar="N", help="only the newest N")
    mean.add_argument("--decay", type=float, help="of --method ema, from file to file")
    mean.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of --method weights, one a file"
    )
    mean.add_argument("--force", action="store_true", help="replace the output file")
    mean.set_defaults(run=_average)
    return parser


# --- inspect


def _inspect(args: argparse.Namespace) -> None:
    state = read_state(args.checkpoint)
    for line in _described(state):
        print(line)
    if args.plot is not None:
        plot_averaging_weights(args.checkpoint).savefig(args.plot)
        print(f"wrote {args.plot}")


def _described(state: dict[str, Any]) -> list[str]:
    """The report, line by line."""
    names, weights = state["candidate_names"], state.get("averaging_weights")
    lines = [f"phase: {state['phase']}   format: {state['format_version']}"]
    if state.get("cycle", 0):
        lines.append(f"cycle: {state['cycle'] + 1}")
    if "started" in state:
        started = state["started"]
        lines.append(f"phase began: epoch {started['epoch']}, optimizer step {started['step']}")
    for name, value in state.get("settings", {}).items():
        lines.append(f"{name}: {value}")
    lines.append(f"candidates: {len(names)}, {_where(state)}")
    if weights is None:
        return [*lines, *(f"  {name}" for name in names)]
    effective = effective_candidates(weights)
    lines.append(f"effective number of candidates: {effective:.1f}")
    return [*lines, "", *_table(names, weights, state["block_names"])]


def _where(state: dict[str, Any]) -> str:
    """Where the candidates are; files are named, not opened."""
    if "candidates" not in state:
        return "no longer needed"
    held = state["candidates"]
    entries = [*held.get("given", []), *held["window"]]
    files = [str(f.get("file")) for e in entries for f in e.get("files", [])]
    tensors = {
        t.data_ptr(): t.nbytes
        for e in entries
        for part in ("parameters", "buffers")
        for t in e.get(part, {}).values()
    }
    parts = []
    if tensors:
        parts.append(f"{sum(tensors.values()) / 2**20:.1f} MiB in the checkpoint")
    if files:
        directories = sorted({file.rpartition("/")[0] or "." for file in files})
        parts.append(f"{len(files)} files in {', '.join(directories)} of the storage directory")
    return " and ".join(parts) or "none kept"


def _table(names: Sequence[str], weights: Tensor, blocks: Sequence[str]) -> list[str]:
    """Averaging weights: a column for each block, or a summary of many."""
    if len(blocks) > MOST_BLOCKS:
        columns = ["mean", "smallest", "largest"]
        values = torch.stack([weights.mean(1), weights.amin(1), weights.amax(1)], dim=1)
        title = f"averaging weights over {len(blocks)} blocks"
    else:
        columns, values, title = list(blocks), weights, "averaging weights"
    left = max(map(len, ["candidate", *names]))
    widths = [max(len(column), 8) for column in columns]
    header = "  ".join(c.rjust(w) for c, w in zip(columns, widths, strict=True))
    rows = [
        name.ljust(left)
        + "  "
        + "  ".join(f"{v:+.4f}".rjust(w) for v, w in zip(row, widths, strict=True))
        for name, row in zip(names, values.tolist(), strict=True)
    ]
    return [title, f"{'candidate'.ljust(left)}  {header}", *rows]


# --- average


def _average(args: argparse.Namespace) -> None:
    output: Path = args.output
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output} must end in one of {', '.join(SUFFIXES)}.")
    if output.exists() and not args.force:
        raise ValueError(f"{output} exists. Use --force to replace it.")
    files = find_files(args.files)
    state = average(
        [str(file) for file in files],
        args.method,
        last=args.last,
        decay=args.decay,
        weights=args.weights,
    )
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix == ".safetensors":
            save_file({k: v.contiguous().clone() for k, v in state.items()}, temporary)
        elif output.suffix == ".ckpt":
            torch.save(_as_checkpoint(files[-1], state), temporary)
        else:
            torch.save(state, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}: the average of {len(files[-(args.last or 0) :])} files")


def _as_checkpoint(newest: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The newest checkpoint with other weights; what belongs to its own weights is left out, so it
    can be loaded (``load_from_checkpoint``, ``test(ckpt_path=...)``) and not resumed.
    """
    checkpoint = load_checkpoint(newest) if newest.suffix == ".ckpt" else None
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"{newest} is no Lightning checkpoint, so the average cannot be one. Write a .pt or "
            f".safetensors file."
        )
    kept = {key: value for key, value in checkpoint.items() if key not in STALE}
    return {**kept, "state_dict": state}


if __name__ == "__main__":
    sys.exit(main())
