"""The switch: building a subspace from candidates, beside what it has to compute.

The reference is one float32 Gram product of the candidates and one float32 product that mixes the
directions of them, with outputs allocated before. All are measured in turn in one run; times are
medians of the rounds. The peak is memory beyond candidates and result, in a process of its own.
Prints a Markdown table.

    python examples/benchmarks/build.py                             # 1.1 million parameters
    python examples/benchmarks/build.py --sizes 11.2e6 --rounds 3   # and 60 candidates: 6 GB
    python examples/benchmarks/build.py --model   # a cost model, fitted here, for larger machines
"""

from __future__ import annotations

import argparse
import functools
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


# --- a cost model

TERMS = ("read", "multiply", "quantize", "store in float32")
# What it is fitted to, and what it is carried to: parameters, candidates, processes with a share of
# the columns each
FITTED = [(1_100_000, 60), (2_200_000, 20), (4_200_000, 20), (4_200_000, 40)]
CARRIED = [
    (87e6, 72, 1),
    (87e6, 72, 8),
    (7e9, 22, 64),
    (7e9, 22, 1024),
    (70e9, 22, 64),
    (70e9, 22, 1024),
]
CORES = 8  # of a process there


def terms(d: float, n: int, bits: int) -> list[float]:
    """How much of each of :data:`TERMS` building has: numbers that are read, or written, and
    products of two.
    """
    k = n - 1
    written = k * d
    packed = bits <= 8
    return [2 * n * d, (n + k) * n * d, written * packed, written * (not packed)]


def model(args: argparse.Namespace) -> None:
    """Take what a product takes from products alone, fit the other constants by least squares of
    the relative error, and print what follows.
    """
    rows, seconds, products = [], [], []
    for numel, n in FITTED:
        flat, members = candidates(numel, n)
        gram, mixed, mixing = torch.empty(n, n), torch.zeros(n - 1, numel), torch.randn(n - 1, n)
        actions: dict[str, Callable[[], object]] = {
            "gram": functools.partial(torch.mm, flat, flat.T, out=gram),
            "mix": functools.partial(torch.mm, mixing, flat, out=mixed),
        }
        for bits in (4, 32):
            config = SubspaceConfig(bits=bits)
            actions[str(bits)] = functools.partial(build_subspace, members, config)
        medians(actions, 1)
        found = medians(actions, args.rounds)
        products.append((found["gram"] + found["mix"]) / terms(numel, n, 32)[1])
        rows += [terms(numel, n, bits) for bits in (4, 32)]
        seconds += [found["4"], found["32"]]
    matrix, measured = torch.tensor(rows).double(), torch.tensor(seconds).double()
    product = statistics.median(products)
    others = [i for i, term in enumerate(TERMS) if term != "multiply"]
    left = 1 - matrix[:, 1] * product / measured
    constants = torch.zeros(len(TERMS)).double()
    constants[1] = product
    constants[others] = non_negative(matrix[:, others] / measured[:, None], left)
    threads = torch.get_num_threads()
    print(f"{threads} threads; nanoseconds of one thread a number:")
    for term, constant in zip(TERMS, constants.tolist(), strict=True):
        print(f"- {term}: {1e9 * constant * threads:.3g}")
    off = matrix @ constants / measured - 1
    print(f"From {100 * float(off.min()):+.0f} % to {100 * float(off.max()):+.0f} % off.\n")
    print(
        f"| D | candidates | processes of {CORES} cores | 4 bits, s | 32 bits, s | candidates, GB |"
    )
    print("|---|---|---|---|---|---|")
    for d, n, w in CARRIED:
        cells = [
            float(torch.tensor(terms(d, n, bits)).double() @ constants) * threads / CORES / w
            for bits in (4, 32)
        ]
        print(f"| {d:.3g} | {n} | {w} | {cells[0]:.3g} | {cells[1]:.3g} | {4e-9 * n * d / w:.3g} |")


def non_negative(matrix: Tensor, target: Tensor) -> Tensor:
    """Least squares without negative constants: those that would be are left out."""
    kept = list(range(matrix.shape[1]))
    while True:
        found = torch.linalg.lstsq(matrix[:, kept], target).solution
        if bool((found >= 0).all()):
            break
        del kept[int(found.argmin())]
    constants = matrix.new_zeros(matrix.shape[1])
    constants[kept] = found
    return constants


def main() -> None:
    """Print a row for each size and width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.1e6])
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-peak", action="store_true")
    parser.add_argument("--model", action="store_true", help="fit a cost model instead")
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        measure_peak(*args.peak)
        return
    if args.model:
        model(args)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| parameters | candidates | bits | two products, s | build, s | ratio | extra, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in args.sizes:
        table(int(size), args.candidates, args)


if __name__ == "__main__":
    main()
