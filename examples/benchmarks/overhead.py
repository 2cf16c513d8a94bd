"""What TWA costs: a step of the phase against a training step, and a candidate against a copy.

Prints one Markdown table; every ratio is of medians measured in this run, round by round in turn.

    python examples/benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_twa import SubspaceOptimizer, build_subspace
from lightning_twa.candidates.candidate import persistent_buffers
from lightning_twa.candidates.taking import take


def convnet(width: int) -> nn.Module:
    """A small VGG-like network for 3x32x32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for i, out in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        if i % 2:
            layers.append(nn.MaxPool2d(2))
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 10))


def measure(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Measure one row per model size and number of candidates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--candidates", type=int, nargs="+", default=[15, 60])
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    print(
        "| parameters | candidates | training step, ms | phase step, ms | ratio "
        "| one copy, ms | candidate, ms | ratio | build, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for width in args.widths:
        for n in args.candidates:
            print(row(width, n, args.rounds, args.batch_size), flush=True)


def row(width: int, n: int, rounds: int, batch_size: int) -> str:
    """One line of the table."""
    model, twin = convnet(width), convnet(width)
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    parameters = [p.detach() for p in model.parameters()]
    candidates = [
        {k: p.detach() + 0.01 * torch.randn_like(p) for k, p in twin.named_parameters()}
        for _ in range(n)
    ]
    start = time.perf_counter()
    subspace = build_subspace(candidates)
    build = time.perf_counter() - start
    del candidates
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
    in_subspace = SubspaceOptimizer(twin.named_parameters(), subspace, total_steps=10 * rounds)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    t = measure(
        {
            "training": lambda: step(model, adamw),
            "phase": lambda: step(twin, in_subspace),
            "copy": lambda: [p.clone() for p in parameters],
            "candidate": lambda: take(model, "candidate", persistent_buffers(model)),
        },
        rounds,
    )
    return (
        f"| {subspace.layout.numel:,} | {n} | {1e3 * t['training']:.0f} | {1e3 * t['phase']:.0f} "
        f"| {t['phase'] / t['training']:.2f} | {1e3 * t['copy']:.2f} "
        f"| {1e3 * t['candidate']:.2f} | {t['candidate'] / t['copy']:.2f} | {build:.1f} |"
    )


if __name__ == "__main__":
    main()
