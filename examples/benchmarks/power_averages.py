"""What power averages cost: beside the optimizer's step, and beside a training step.

For models of several sizes: the seconds of an update that adds to the sum, of one that folds the
sum into the averages, and the mean of both at the interval that a run of so many steps has, as a
share of a training step with a batch of so many samples. Medians of several rounds in one process.

    python examples/benchmarks/power_averages.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_twa import CollectConfig
from lightning_twa.candidates.power_averages import PowerAverages, interval_of

SIZES = {"0.1 M": (128, 3), "1 M": (512, 4), "4 M": (1024, 4), "16 M": (2048, 4)}  # width, layers


def network(width: int, layers: int) -> nn.Module:
    """A multilayer perceptron of ``layers * width * width`` weights."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts)


def median(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measure(width: int, layers: int, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of a training step, of an addition, and of the averages' part of a run's step."""
    net = network(width, layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    inputs = torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()

    interval = interval_of(steps)
    averages = PowerAverages(CollectConfig().power_averages, interval)
    step()
    averages.update(net)
    averages.interval = 10**9
    add = median(lambda: averages.update(net), rounds)
    fold = _fold(averages, net, rounds)
    return {
        "numel": float(sum(p.numel() for p in net.parameters())),
        "step": median(step, rounds),
        "add": add,
        "fold": fold,
        "mean": add + fold / interval,
        "interval": float(interval),
    }


def _fold(averages: PowerAverages, net: nn.Module, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        averages.update(net)
        begin = time.perf_counter()
        averages._take_in()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What power averages cost.")
    parser.add_argument("--batch", type=int, default=256, help="samples in a batch")
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps of the run")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken")
    parser.add_argument("--largest", default="16 M", choices=list(SIZES), help="the last model")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"batch {arguments.batch}, run of {arguments.steps} steps, {threads} threads\n")
    print("| parameters | training step, ms | addition, ms | fold, ms | a step's share |")
    print("|---:|---:|---:|---:|---:|")
    for name, (width, layers) in SIZES.items():
        found = measure(width, layers, arguments.batch, arguments.steps, arguments.rounds)
        share = 100 * found["mean"] / found["step"]
        print(
            f"| {int(found['numel']):,} | {1e3 * found['step']:.2f} | {1e3 * found['add']:.3f} | "
            f"{1e3 * found['fold']:.2f} | {share:.2f} % |"
        )
        if name == arguments.largest:
            break


if __name__ == "__main__":
    main()
