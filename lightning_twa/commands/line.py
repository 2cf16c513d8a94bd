"""``lightning-twa``, or ``python -m lightning_twa``: the commands and their arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_twa.average import METHODS
from lightning_twa.commands.average import SUFFIXES, average_files
from lightning_twa.commands.inspect import describe, is_candidates
from lightning_twa.commands.plot import plot
from lightning_twa.figures import plot_averaging_weights
from lightning_twa.words import printable

__all__ = ["main"]

INSPECT = """\
Print what a file is: a checkpoint of a run with TWACallback (its stage, which weights it holds, the
candidates and their averaging weights, losses on held-out data, and which of the files that it
names are there), a candidate, or an average of files. No Python objects are loaded, and no named
file is opened."""
AVERAGE = """\
Average files with weights that are not learned. The order of the files counts for --last, --method
ema or wsm, and --weights: oldest first; those of a pattern come in natural order (epoch=2 before
epoch=10). BatchNorm statistics are averaged too, and do not fit the average, unless --config or
--module say how the model and its training data are made."""
FORMATS = """\
The suffix of the output says what is written: .safetensors; .pt or .pth, a state dict; .ckpt, the
last file (a Lightning checkpoint) with the average as its weights, without the states of
optimizers, schedulers, loops and callbacks, which belong to other weights. It can be loaded and
tested, not resumed. 'inspect' shows what was averaged, and how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0; 2 for wrong usage, and for files that are not what
    the command needs; 1 where something fails, such as writing.
    """
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in "| head"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the flush at exit
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).stem == "lightning-twa"
    parser = argparse.ArgumentParser(
        prog="lightning-twa" if installed else "python -m lightning_twa",
        description="Trainable Weight Averaging for Lightning.",
    )
    parser.add_argument(
        "--version", action="version", version=f"lightning-twa {version('lightning-twa')}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_inspect(commands)
    _add_average(commands)
    _add_plot(commands)
    return parser


# --- inspect


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect", help="print what a checkpoint or a file of weights is", description=INSPECT
    )
    inspect.add_argument(
        "path",
        type=Path,
        help="a Lightning checkpoint; a candidate's .safetensors file, or a directory of them; or "
        "what 'average' wrote",
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


def _inspect(args: argparse.Namespace) -> None:
    if is_candidates(args.path):
        for name in ("plot", "candidates"):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name} needs a checkpoint, but {args.path} is none")
    for line in describe(args.path, args.candidates):
        print(printable(line))
    if args.plot is not None:
        plot_averaging_weights(args.path).savefig(args.plot)
        print(f"wrote {args.plot}")


# --- plot


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    drawing = commands.add_parser(
        "plot",
        help="draw the figures of a run",
        description="Write the figures of a run, of its checkpoint, as files: averaging weights, "
        "the table of losses on held-out data, and the loss along the path of the phase. Those "
        "that cannot be drawn are named, with the reason.",
    )
    drawing.add_argument("path", type=Path, help="a checkpoint of the phase or after it")
    drawing.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where to; by default beside the checkpoint",
    )
    drawing.add_argument("--format", choices=("png", "svg", "pdf"), default="png")
    drawing.set_defaults(run=_plot, parser=drawing)


def _plot(args: argparse.Namespace) -> None:
    for line in plot(args.path, args.output, args.format):
        print(printable(line))


# --- average


def _add_average(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    mean = commands.add_parser(
        "average", help="average checkpoint files", description=AVERAGE, epilog=FORMATS
    )
    mean.add_argument(
        "files",
        nargs="+",
        help="checkpoints, state dicts, safetensors, directories, or quoted patterns",
    )
    mean.add_argument("-o", "--output", type=_output, required=True, metavar="FILE")
    mean.add_argument("--method", choices=METHODS, default="uniform")
    mean.add_argument("--anchor", metavar="FILE", help="of --method model_stock: what was tuned")
    mean.add_argument("--last", type=_count, metavar="N", help="only the last N files")
    mean.add_argument(
        "--sigma-rel",
        type=_decay,
        metavar="WIDTH",
        help="of --method power, of one checkpoint of a run from before or within the phase: the "
        "average over all steps of which it is the width, as a share of the run",
    )
    mean.add_argument("--decay", type=_decay, help="of --method ema, from file to file; in (0, 1)")
    mean.add_argument(
        "--weights",
        type=_numbers,
        nargs="+",
        metavar="W",
        help="of --method weights: a number for each file, also with commas (--weights=-1e-3,1)",
    )
    mean.add_argument(
        "--filter",
        nargs="+",
        metavar="PATTERN",
        help="average only tensors of these names ('encoder', '*.bias'); the others are those of "
        "the last file",
    )
    mean.add_argument(
        "--exclude", nargs="+", metavar="PATTERN", help="do not average tensors of these names"
    )
    mean.add_argument(
        "--lora",
        choices=("factors", "products"),
        default="factors",
        help="of low-rank adapters, average the two factors, or what they add to the model",
    )
    mean.add_argument("--monitor", metavar="NAME", help="of --method greedy: a validation metric")
    mean.add_argument(
        "--mode",
        choices=("min", "max"),
        help="whether it is to be small or large, where its name does not say so",
    )
    model = mean.add_argument_group("the model, for BatchNorm statistics and --method greedy")
    model.add_argument(
        "--config", type=Path, metavar="FILE", help="config.yaml that LightningCLI saved"
    )
    model.add_argument("--module", metavar="CLASS", help="of the model: package.file.Class")
    model.add_argument("--data", metavar="CLASS", help="of its LightningDataModule")
    model.add_argument(
        "--batches", type=_count, metavar="N", help="training batches; by default an epoch"
    )
    mean.add_argument("--force", action="store_true", help="replace the output file")
    mean.set_defaults(run=_average, parser=mean)


def _average(args: argparse.Namespace) -> None:
    options = (
        ("ema", "decay"),
        ("weights", "weights"),
        ("model_stock", "anchor"),
        ("greedy", "monitor"),
        ("power", "sigma_rel"),
    )
    for method, option in options:
        if (args.method == method) != (getattr(args, option) is not None):
            args.parser.error(f"--method {method} and --{option.replace('_', '-')} go together")
    if args.mode is not None and args.monitor is None:
        args.parser.error("--mode is of --monitor")
    if args.config is None and args.module is None:
        for option in ("data", "batches"):
            if getattr(args, option) is not None:
                args.parser.error(f"--{option} needs --config or --module")
        if args.method == "greedy":
            args.parser.error("--method greedy needs the model: --config or --module")
    weights = None if args.weights is None else [w for part in args.weights for w in part]
    for line in average_files(args, weights):
        print(printable(line))


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
