"""What a step of the phase sends, holds and costs when several processes share it.

Compares, on random gradients and without forward and backward passes:

* ``DDP AdamW``: all-reduce of the gradients and AdamW on all parameters;
* ``paper, rows``: the scheme of arXiv 2205.13104v4, section 3.4, as we read it: each process holds
  some of the candidates; the gradient and the update are all-reduced, ``2 D`` numbers a step;
* ``replicate`` and ``shard`` of this package, with 32 bits and with packed directions.

Bytes are counted at every collective, and converted to what a process sends in a ring: all-reduce
``2 (W - 1) / W`` of the tensor, reduce-scatter and all-gather ``(W - 1) / W`` of the whole. A
slower link is simulated: after each collective the process sleeps for what the counted bytes would
take.

Run ``python examples/benchmarks/communication.py``; with ``--model``, a cost model is fitted to the
measurements and carried to more and larger devices.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from communication_costs import carry, fit
from torch import Tensor

from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.machine import gather_objects
from lightning_twa.subspace import (
    ParameterLayout,
    Replicate,
    Shard,
    cut_evenly,
    held_everywhere,
)

CPU = torch.device("cpu")
# Share of the tensor that a process sends in a ring of W, and which argument is the whole tensor.
RINGS: dict[str, tuple[float, int]] = {
    "all_reduce": (2.0, 0),
    "reduce_scatter_single": (1.0, 1),
    "reduce_scatter_tensor": (1.0, 1),
    "all_gather_single": (1.0, 0),
    "all_gather_into_tensor": (1.0, 0),
}
SOLVER = SolverConfig(name="sgd", lr=1e-12, schedule="constant", momentum=0.0)


class Wire:
    """Counts what this process sends, and sleeps for what a slower link would take."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.bandwidth = math.inf  # bytes per second
        self.sent = 0.0
        self.messages = 0
        for name, (share, whole) in RINGS.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name), share, whole))

    def _counted(self, plain: Callable[..., Any], share: float, whole: int) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            size = dist.get_world_size()
            sent = share * (size - 1) / size * args[whole].nbytes
            self.sent += sent
            self.messages += 1
            if not math.isinf(self.bandwidth):
                time.sleep(sent / self.bandwidth + self.latency)
            return result

        return call


def shapes(numel: int) -> dict[str, tuple[int, ...]]:
    """A few tensors of so many elements in all."""
    side = max(int((numel * 0.3) ** 0.5), 1)
    rest = numel - 2 * side * side - side
    return {"a": (side, side), "bias": (side,), "b": (side, side), "c": (max(rest, 1),)}


def tensors(numel: int, seed: int) -> dict[str, Tensor]:
    """Random tensors, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in shapes(numel).items()}


class AdamW:
    """DDP's exchange and torch's AdamW."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.named = named
        self.optimizer = torch.optim.AdamW(named.values(), lr=1e-12, fused=True)
        self.nbytes = 0

    def step(self) -> None:
        """As DDP buckets gradients, they are exchanged in one message here."""
        flat = torch.cat([p.grad.view(-1) for p in self.named.values()])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for p in self.named.values():
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        self.optimizer.step()


class Rows:
    """The paper's scheme: this process's rows of the normalised candidates, and 2 D numbers."""

    def __init__(self, named: dict[str, Tensor], members: list[dict[str, Tensor]]) -> None:
        self.named = named
        rows = torch.stack([torch.cat([t.view(-1) for t in m.values()]) for m in members])
        center = rows.mean(0)
        rows = (rows - center)[dist.get_rank() :: dist.get_world_size()]
        self.rows = rows / rows.norm(dim=1, keepdim=True)
        self.nbytes = self.rows.nbytes
        self.gradient = torch.zeros(len(self.rows))
        with torch.no_grad():
            self._add(center - torch.cat([p.view(-1) for p in named.values()]))

    def _add(self, flat: Tensor) -> None:
        start = 0
        for p in self.named.values():
            p += flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    @torch.no_grad()
    def step(self) -> None:
        """All-reduce the gradient, step the coefficients of these rows, all-reduce the update."""
        flat = torch.cat([p.grad.view(-1) for p in self.named.values()])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        self.gradient = self.rows @ flat
        update = (-1e-12 * self.gradient) @ self.rows
        dist.all_reduce(update)
        self._add(update)


class Twa:
    """This package's step."""

    def __init__(
        self, named: dict[str, Tensor], members: list[dict[str, Tensor]], kind: str, bits: int
    ) -> None:
        self.named = named
        config = SubspaceConfig(basis="candidates", bits=bits)
        whole = ParameterLayout.from_tensors(named)
        rank, size = dist.get_rank(), dist.get_world_size()
        every = cut_evenly(whole, size)
        exchange: Any = Replicate(CPU)
        columns = held_everywhere(whole, rank, size)
        if kind == "shard":
            exchange, columns = Shard(every, averaged=False, device=CPU), every[rank]
        subspace = build_subspace(members, config, columns=columns)
        self.nbytes = subspace.stored.nbytes
        self.optimizer = SubspaceOptimizer(named.items(), subspace, SOLVER, exchange=exchange)
        self.step = self.optimizer.step

    @property
    def gradient(self) -> Tensor:
        """Of the coefficients, from the parameters' gradients as they are now."""
        found = self.optimizer.exchange.project(self.optimizer.subspace, [*self.named.values()])
        assert found is not None
        return found[:, 0]


def check(schemes: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    """The paper's rows, replicate and shard give one coefficient gradient; ranks hold one model."""
    set_gradients(schemes, gradients)
    rows = schemes["paper, rows"]
    rows.step()
    mine = gather_objects(rows.gradient)
    size = len(mine)
    expected = torch.empty(sum(len(part) for part in mine), dtype=torch.float64)
    for rank, part in enumerate(mine):
        expected[rank::size] = part.double()
    for name, scheme in schemes.items():
        if not isinstance(scheme, Twa):
            continue
        if name.endswith("32 bits"):
            error = float((scheme.gradient - expected).norm() / expected.norm())
            if error > 1e-3:
                raise RuntimeError(f"{name}: coefficient gradients differ by {error:.2g}")
        scheme.step()
        sums = gather_objects([p.detach().double().sum().item() for p in scheme.named.values()])
        if any(other != sums[0] for other in sums):
            raise RuntimeError(f"{name}: the processes' weights differ")


def set_gradients(schemes: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    """The same gradients for every scheme; AdamW replaces its own."""
    for scheme in schemes.values():
        for name, parameter in scheme.named.items():
            parameter.grad = gradients[name].clone()


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    """One process: measure every scheme at every size and bandwidth."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.processes
    )
    wire = Wire(args.latency * 1e-6)
    results = []
    for numel in args.numel:
        members = [tensors(numel, i) for i in range(args.candidates)]

        def model(numel: int = numel) -> dict[str, Tensor]:
            return {k: torch.zeros(s, requires_grad=True) for k, s in shapes(numel).items()}

        schemes: dict[str, Any] = {
            "DDP AdamW": AdamW(model()),
            "paper, rows": Rows(model(), members),
        }
        for kind in ("replicate", "shard"):
            for bits in (32, args.bits):
                schemes[f"{kind}, {bits} bits"] = Twa(model(), members, kind, bits)
        del members
        gradients = tensors(numel, 1000 + rank)
        check(schemes, gradients)
        set_gradients(schemes, gradients)
        for name, scheme in schemes.items():
            row: dict[str, Any] = {"scheme": name, "numel": numel, "basis": scheme.nbytes, "ms": {}}
            for bandwidth in (math.inf, *args.bandwidth):
                wire.bandwidth = bandwidth * 1e9 / 8
                seconds = []
                for _ in range(args.rounds + 1):
                    dist.barrier()
                    wire.sent, wire.messages = 0.0, 0
                    start = time.perf_counter()
                    scheme.step()
                    seconds.append(time.perf_counter() - start)
                row["sent"], row["messages"] = wire.sent, wire.messages
                row["ms"][str(bandwidth)] = 1e3 * statistics.median(seconds[1:])
            results.append(row)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes; process 0's rows."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            work, (folder, args), nprocs=args.processes, start_method="spawn"
        )
        rows: list[dict[str, Any]] = json.loads(Path(folder, "results.json").read_text())
    return rows


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The measurements, as Markdown."""
    for numel in args.numel:
        some = [row for row in rows if row["numel"] == numel]
        names = list(some[0]["ms"])
        titles = ["loopback" if name == "inf" else f"{float(name):g} Gbit/s" for name in names]
        print(
            f"\n{args.processes} processes, one thread each; D = {numel:,}, "
            f"{args.candidates} candidates; medians of {args.rounds} steps; links slower than the "
            f"loopback are simulated\n"
        )
        print("| scheme | directions, MiB a process | sent, MB a step | "
              + " | ".join(f"{t}, ms | against AdamW" for t in titles) + " |")  # fmt: skip
        print("|---|---:|---:|" + "---:|---:|" * len(titles))
        for row in some:
            cells = [
                f"{row['ms'][name]:.1f} | {row['ms'][name] / some[0]['ms'][name]:.2f}x"
                for name in names
            ]
            print(f"| {row['scheme']} | {row['basis'] / 2**20:.1f} | {row['sent'] / 1e6:.4f} | "
                  + " | ".join(cells) + " |")  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What a step of the phase sends, holds and costs.")
    parser.add_argument("--numel", type=int, nargs="+", default=[8_000_000, 16_000_000])
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bandwidth", type=float, nargs="*", default=[10.0, 1.0], help="Gbit/s")
    parser.add_argument("--latency", type=float, default=50.0, help="microseconds a collective")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    parser.add_argument("--model", action="store_true", help="fit and carry the cost model")
    parser.add_argument("--far-numel", type=float, nargs="+", default=[1e8, 1e9, 1e10, 7e10])
    parser.add_argument("--far-processes", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--far-candidates", type=int, default=60)
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB")
    parser.add_argument("--gpu-bandwidth", type=float, default=3350.0, help="GB/s")
    parser.add_argument("--link", type=float, default=50.0, help="GB/s per GPU between nodes")
    parser.add_argument("--gpu-latency", type=float, default=20.0, help="microseconds")
    args = parser.parse_args()
    rows = measure(args)
    print_table(rows, args)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.model:
        fit(rows, args)
        carry(args)


if __name__ == "__main__":
    main()
