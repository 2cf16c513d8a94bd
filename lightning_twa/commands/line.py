"""``python -m lightning_twa``: the commands and their arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_twa.average import METHODS, average
from lightning_twa.candidates import find_files, unique_names
from lightning_twa.commands.average import SUFFIXES, check_free, write_average
from lightning_twa.commands.inspect import describe_candidates, describe_run, is_candidates
from lightning_twa.figures import plot_averaging_weights
from lightning_twa.words import printable

__all__ = ["main"]

KINDS = {"ema": "exponential moving", "weights": "weighted", "wsm": "decay-curve"}
INSPECT = """\
Print the phase, the settings, the candidates and their averaging weights, and which of the files
that a checkpoint names are there. No Python objects are loaded, and no named file is opened."""
AVERAGE = """\
Average files with weights that are not learned. The order of the files counts for --last, --method
ema or wsm, and --weights: oldest first; those of a pattern come in natural order (epoch=2 before
epoch=10). BatchNorm statistics are averaged too, and do not fit the average: compute them anew."""
FORMATS = """\
The suffix of the output says what is written: .safetensors; .pt or .pth, a state dict; .ckpt, the
last file (a Lightning checkpoint) with the average as its weights, without the states of
optimizers, schedulers, loops and callbacks, which belong to other weights. It can be loaded and
tested, not resumed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in "| head"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the flush at exit
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_twa", description="Trainable Weight Averaging for Lightning."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser(
        "inspect", help="print what a checkpoint holds of TWA", description=INSPECT
    )
    inspect.add_argument(
        "path",
        type=Path,
        help="a Lightning checkpoint; or a candidate's .safetensors file, or a directory of them",
    )
    inspect.add_argument(
        "--plot", type=_figure, metavar="FILE", help="also draw the averaging weights (.png, .pdf)"
    )
    inspect.add_argument(
        "--candidates",
        type=Path,
        metavar="DIR",
        help="the storage directory (StorageConfig.dirpath) that the files of candidates are in; "
        "by default twa_candidates beside the checkpoint or above",
    )
    inspect.set_defaults(run=_inspect, parser=inspect)

    mean = commands.add_parser(
        "average", help="average checkpoint files", description=AVERAGE, epilog=FORMATS
    )
    mean.add_argument(
        "files",
        nargs="+",
        help="checkpoints, state dicts, safetensors, directories, or quoted patterns",
    )
    mean.add_argument("-o", "--output", type=_output, required=True, metavar="FILE")
    mean.add_argument(
        "--method",
        choices=[method for method in METHODS if method not in ("greedy", "power")],
        default="uniform",
    )
    mean.add_argument("--anchor", metavar="FILE", help="of --method model_stock: what was tuned")
    mean.add_argument("--last", type=_count, metavar="N", help="only the last N files")
    mean.add_argument("--decay", type=_decay, help="of --method ema, from file to file; in (0, 1)")
    mean.add_argument(
        "--weights",
        type=_numbers,
        nargs="+",
        metavar="W",
        help="of --method weights: a number for each file, also with commas (--weights=-1e-3,1)",
    )
    mean.add_argument("--force", action="store_true", help="replace the output file")
    mean.set_defaults(run=_average, parser=mean)
    return parser


# --- inspect


def _inspect(args: argparse.Namespace) -> None:
    if is_candidates(args.path):
        for name in ("plot", "candidates"):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name} needs a checkpoint, but {args.path} is none")
        lines = describe_candidates(args.path)
    else:
        lines = describe_run(args.path, args.candidates)
    for line in lines:
        print(printable(line))
    if args.plot is not None:
        plot_averaging_weights(args.path).savefig(args.plot)
        print(f"wrote {args.plot}")


# --- average


def _output(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(SUFFIXES)}")
    return Path(text)


def _figure(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory of {text!r} does not exist; make it")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer, 1 or more")
    return int(text)


def _decay(text: str) -> float:
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be between 0 and 1")
    return number


def _numbers(text: str) -> list[float]:
    return [_number(part) for part in text.split(",")]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number")
    return number


def _average(args: argparse.Namespace) -> None:
    options = (("ema", "decay"), ("weights", "weights"), ("model_stock", "anchor"))
    for method, option in options:
        if (args.method == method) != (getattr(args, option) is not None):
            args.parser.error(f"--method {method} and --{option} go together")
    output: Path = args.output
    check_free(output, args.force)
    files = find_files(args.files)
    weights = None if args.weights is None else [w for part in args.weights for w in part]
    used = files[-(args.last or 0) :]
    if weights is not None and len(weights) != len(used):
        args.parser.error(f"--weights has {len(weights)} numbers, but {len(used)} file(s) are used")
    paths = [str(file) for file in used]
    state = average(paths, args.method, decay=args.decay, weights=weights, anchor=args.anchor)
    write_average(output, used[-1], state, args.force)
    names = unique_names(used)
    which = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} .. {names[-1]}"
    kind = KINDS.get(args.method, args.method)
    print(printable(f"wrote {output}: the {kind} average of {which}"))
