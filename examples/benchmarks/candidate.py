"""What taking a candidate holds training up for, and what an average costs that is validated.

Prints two Markdown tables. Everything of a row is measured in turn, and every ratio is of medians
of this run. Copies and candidates stay, each in memory that nothing was in before.

    python examples/benchmarks/candidate.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_twa import StorageConfig
from lightning_twa.candidates import RunningMean, Store, put_average

FIRST = 2  # rounds that do not count


def layers(width: int, depth: int = 4) -> nn.Module:
    """Linear layers: few tensors."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def convnet(width: int) -> nn.Module:
    """Convolutions with BatchNorm: many small tensors, and buffers."""
    parts: list[nn.Module] = []
    channels = 3
    for out in (width, width, 2 * width, 2 * width, 4 * width, 4 * width):
        parts += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * 16, 10))


def measure(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + FIRST):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[FIRST:]) for name, values in times.items()}


class Taker:
    """Takes one candidate after another."""

    def __init__(self, model: nn.Module, kind: Any, root: Path) -> None:
        self.model, self.number = model, 0
        self.store = Store(StorageConfig(kind=kind), root=root)

    def take(self) -> None:
        """The next."""
        self.number += 1
        self.store.add(self.model, f"step={self.number}")


def taking(name: str, model: nn.Module, rounds: int, root: Path) -> str:
    """One row of the first table."""
    parameters = [p.detach() for p in model.parameters()]
    held: list[Any] = []

    def copy() -> None:
        held.append([p.clone() for p in parameters])

    memory, files = Taker(model, "memory", root), Taker(model, "disk", root)
    t = measure(
        {"copy": copy, "memory": memory.take, "files": files.take, "disk": files.store.settle},
        rounds,
    )
    return (
        f"| {name} | {sum(p.numel() for p in parameters):,} | {len(parameters)} "
        f"| {1e3 * t['copy']:.2f} | {1e3 * t['memory']:.2f} | {t['memory'] / t['copy']:.2f} "
        f"| {1e3 * t['files']:.2f} | {t['files'] / t['copy']:.2f} | {1e3 * t['disk']:.1f} |"
    )


def averaging(n: int, model: nn.Module, rounds: int) -> str:
    """One row of the second table: a candidate more before each average."""
    store, mean, number = Store(), RunningMean(), iter(range(10**6))
    for _ in range(n):
        store.add(model, f"step={next(number)}")

    def take() -> None:
        store.add(model, f"step={next(number)}")

    t = measure(
        {
            "take": take,
            "all": lambda: put_average(model, store),
            "sum": lambda: put_average(model, store, None, mean.parameters(store)),
        },
        rounds,
    )
    return (
        f"| {n} to {len(store)} | {1e3 * t['all']:.1f} | {1e3 * t['sum']:.1f} "
        f"| {t['all'] / t['sum']:.1f} |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 16, 60])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        "\n| model | parameters | tensors | one copy, ms | in memory, ms | ratio "
        "| in a file, ms | ratio | then on the disk, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = [("linear", layers(width)) for width in args.widths]
        models += [("convolutions", convnet(channels)) for channels in args.channels]
        for name, model in models:
            print(taking(name, model, args.rounds, Path(folder)), flush=True)
    model = layers(args.widths[-1])
    print("\n| candidates | average of all, ms | from the sum of before, ms | ratio |")
    print("|---|---|---|---|")
    for n in args.candidates:
        print(averaging(n, model, max(args.rounds // 2, 1)), flush=True)


if __name__ == "__main__":
    main()
