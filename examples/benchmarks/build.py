"""The switch: building a subspace from candidates, beside what it has to compute.

The reference is one float32 Gram product of the candidates and one float32 product that mixes the
directions of them, with outputs allocated before. All are measured in turn in one run; times are
medians of the rounds. The peak is memory beyond candidates and result, in a process of its own.
Prints a Markdown table.

    python examples/benchmarks/build.py                             # 1.1 million parameters
    python examples/benchmarks/build.py --sizes 11.2e6 --rounds 3   # and 60 candidates: 6 GB
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace

SHAPES = ((512, 512, 3, 3), (512,), (512, 256, 1, 1), (512,))


def candidates(numel: int, n: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Around a common point, in tensors of a convolutional network's shapes: all in one matrix,
    ``(n, numel)``, and as views of it.
    """
    rows = torch.empty(n, numel)
    center = torch.randn(numel)
    for row in rows:
        torch.randn(numel, out=row)
        row.mul_(0.05).add_(center)
    sizes: list[torch.Size] = []
    left = numel
    while left:
        size = torch.Size(SHAPES[len(sizes) % 4])
        sizes.append(size if size.numel() <= left else torch.Size((left,)))
        left -= sizes[-1].numel()
    cuts = [size.numel() for size in sizes]
    members = [
        {
            f"p{i}": t.view(size)
            for i, (t, size) in enumerate(zip(row.split(cuts), sizes, strict=True))
        }
        for row in rows
    ]
    return rows, members


def medians(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(numel: int, n: int, bits: int) -> float:
    """Bytes at the peak of building, beyond candidates and result, in another process."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", str(numel), str(n), str(bits)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure_peak(numel: int, n: int, bits: int) -> None:
    """Print what :func:`peak` reads; by Linux's high-water mark, which can be set back."""
    _, members = candidates(numel, n)
    build_subspace([{"p": torch.randn(70_000)} for _ in range(n)], SubspaceConfig(bits=bits))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    print(_status("VmHWM") - before - subspace.nbytes)


def _status(field: str) -> float:
    line = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert line is not None
    return 1024.0 * int(line.group(1))


def table(numel: int, n: int, args: argparse.Namespace) -> None:
    """Measure one size."""
    rows, members = candidates(numel, n)
    gram, mixed = torch.empty(n, n), torch.zeros(n - 1, numel)
    mixing = torch.randn(n - 1, n)
    actions: dict[str, Callable[[], object]] = {
        "gram": lambda: torch.mm(rows, rows.T, out=gram),
        "mix": lambda: torch.mm(mixing, rows, out=mixed),
    }
    medians(actions, 1)
    for bits in args.bits:
        config = SubspaceConfig(bits=bits)
        actions[str(bits)] = lambda config=config: build_subspace(members, config)
    found = medians(actions, args.rounds)
    reference = found["gram"] + found["mix"]
    for bits in args.bits:
        extra = "-" if args.skip_peak else f"{peak(numel, n, bits) / 1e6:.0f}"
        print(
            f"| {numel:,} | {n} | {bits} | {found['gram']:.2f} + {found['mix']:.2f} "
            f"| {found[str(bits)]:.2f} | {found[str(bits)] / reference:.2f} | {extra} |",
            flush=True,
        )


def main() -> None:
    """Print a row for each size and width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.1e6])
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-peak", action="store_true")
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        measure_peak(*args.peak)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| parameters | candidates | bits | two products, s | build, s | ratio | extra, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in args.sizes:
        table(int(size), args.candidates, args)


if __name__ == "__main__":
    main()
