"""One subspace step (project, solve, expand) at several widths, beside what it has to beat.

References, all measured in the same run, in turn: dense float32 matrix-vector products; the step of
the paper's code, written afresh from its formula (a byte per code, unpacked to floats, multiplied
and summed); a fused AdamW step on the parameters; and reading the packed bytes twice and four
vectors of D floats at the speed of a plain copy (the floor). Prints Markdown tables; times are
medians of the rounds.

    python examples/benchmarks/projection.py             # 1.1 and 11.2 million parameters
    python examples/benchmarks/projection.py --large     # and 87 million
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_twa import SubspaceConfig, SubspaceOptimizer
from lightning_twa.subspace import ParameterLayout, Subspace
from lightning_twa.subspace.directions import (
    GROUP,
    DenseDirections,
    PackedDirections,
    Scratch,
    pad,
)


def parameters(numel: int) -> dict[str, Tensor]:
    """Tensors of a convolutional network's shapes, about ``numel`` elements in all."""
    shapes: list[tuple[int, ...]] = []
    total, i = 0, 0
    while total < numel:
        shape = ((512, 512, 3, 3), (512,), (512, 256, 1, 1), (512,))[i % 4]
        size = torch.Size(shape).numel()
        if size > numel - total:
            shape = (numel - total,)
        shapes.append(shape)
        total += torch.Size(shape).numel()
        i += 1
    return {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}


def subspace(layout: ParameterLayout, n: int, bits: int, path: str, device: str) -> Subspace:
    """A subspace with random directions; building from candidates is not what is measured."""
    k, where = n - 1, torch.device(device)
    if bits <= 8:
        stored = PackedDirections(layout, k, bits, where, path=path)
    else:
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        stored = DenseDirections(layout, k, dtype, where)
    scratch = Scratch()
    for tile, spans in enumerate(pad(layout).spans_of_tiles()):
        width = -(-spans[-1].target.stop // GROUP) * GROUP
        stored.write(tile, torch.randn(k, width) / n**0.5, scratch)
    stored.close(torch.zeros(2, dtype=torch.float64))
    center = torch.randn(layout.numel, device=device)
    mixing = torch.zeros(1, k, n, dtype=torch.float64)
    return Subspace(SubspaceConfig(bits=bits), layout, center, stored, mixing)


class PaperStep:
    """The paper's step: unpack a byte per code, scale, broadcast-multiply with the gradient and
    sum, then broadcast-multiply with the coefficients and sum; a block of columns at a time.
    """

    def __init__(self, rows: int, columns: int, device: str) -> None:
        self.codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
        self.low, self.step = (
            torch.randn(rows, 1, device=device),
            torch.rand(rows, 1, device=device),
        )

    def __call__(self, g: Tensor, block: int = 1 << 20) -> Tensor:
        update = torch.empty_like(g)
        blocks = [slice(a, a + block) for a in range(0, len(g), block)]
        x = sum(((self.codes[:, b].float() * self.step + self.low) * g[b]).sum(1) for b in blocks)
        assert isinstance(x, Tensor)
        for b in blocks:
            rows = self.codes[:, b].float() * self.step + self.low
            update[b] = (rows * x[:, None]).sum(0)
        return update


def measure(actions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each action, taken in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class ExtraMemory:
    """Peak bytes that a block of code needs beyond what is there when it begins.

    The CPU's peak is Linux's high-water mark of the resident set, which can be set back.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> float:
        line = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        assert line is not None
        return 1024.0 * int(line.group(1))

    def peak(self) -> float:
        """Bytes so far."""
        now = float(torch.cuda.max_memory_allocated()) if self.cuda else self._status("VmHWM")
        return now - self.before


def reference_times(
    tensors: dict[str, Tensor], numel: int, n: int, args: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Milliseconds of what a step is compared with; bytes that a copy moves in one of them."""
    device = args.device
    flat, source = torch.randn(numel, device=device), torch.randn(numel, device=device)
    x = torch.randn(n - 1, device=device)
    dense = torch.randn(n - 1, numel, device=device)
    adamw = torch.optim.AdamW(tensors.values(), lr=0.0, fused=True)
    actions: dict[str, Callable[[], object]] = {
        "dense": lambda: (dense @ flat, x @ dense),
        "adamw": adamw.step,
        "copy": lambda: flat.copy_(source),
    }
    if not args.skip_paper:
        paper = PaperStep(n - 1, numel, device)
        actions["paper"] = lambda: paper(flat)
    base = measure(actions, args.rounds, device)
    return base, 2 * flat.nbytes / base["copy"]


def table(numel: int, n: int, args: argparse.Namespace) -> None:
    """Measure one model size."""
    device = args.device
    tensors = {name: t.to(device).requires_grad_() for name, t in parameters(numel).items()}
    layout = ParameterLayout.from_tensors(tensors)
    for t in tensors.values():
        t.grad = torch.randn_like(t)
    base, bytes_per_ms = reference_times(tensors, numel, n, args)
    names = {
        "dense": "dense float32 products",
        "adamw": "fused AdamW step",
        "paper": "paper's step",
    }
    print(f"\nD = {numel:,}, n = {n}; a copy moves {bytes_per_ms / 1e6:.1f} GB/s")
    for key, name in names.items():
        if key in base:
            print(f"- {name}: {base[key]:.1f} ms")
    print(
        "| bits | path | step, ms | paper's / step | dense / step | step / floor | basis, MB "
        "| float32 / basis | extra memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for bits in args.bits:
        for path in ("tiled", "compiled") if bits <= 8 else ("dense",):
            if path == "tiled" and args.skip_tiled:
                continue
            torch.compiler.reset()
            basis = subspace(layout, n, bits, path, device)
            optimizer = SubspaceOptimizer(tensors.values(), basis, total_steps=100)
            optimizer.step()
            memory = ExtraMemory(device)
            step = measure({"step": optimizer.step}, args.rounds, device)["step"]
            extra = memory.peak()
            held = basis.stored.nbytes
            floor = (2 * held + 4 * 4 * numel) / bytes_per_ms
            ratio = f"{base['paper'] / step:.1f}" if "paper" in base else "-"
            print(
                f"| {bits} | {basis.stored.path} | {step:.1f} | {ratio} | "
                f"{base['dense'] / step:.2f} "
                f"| {step / floor:.2f} | {held / 1e6:.1f} | {4 * (n - 1) * numel / held:.2f} "
                f"| {extra / 1e6:.1f} |",
                flush=True,
            )
            del optimizer, basis


def main() -> None:
    """Print a table per model size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also D = 87e6, n = 72")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.1e6, 11.2e6])
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--skip-paper", action="store_true", help="it is slow and needs D x n bytes"
    )
    parser.add_argument("--skip-tiled", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    for size in args.sizes:
        table(int(size), args.candidates, args)
    if args.large:
        table(87_000_000, 72, args)


if __name__ == "__main__":
    main()
