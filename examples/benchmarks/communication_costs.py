"""A cost model of a step that several processes share.

It is fitted to what ``communication.py`` measures, and carried to more and larger devices.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from lightning_twa.subspace.directions import TILE


@dataclass(frozen=True)
class Cost:
    """What one step of one process does.

    Args:
        vectors: Bytes of vectors of the model's length that are read and written.
        dense: Bytes of full-precision directions that are read.
        packed: Bytes of packed directions that are read.
        reduced: Bytes sent in all-reduces.
        scattered: Bytes sent in reduce-scatters and all-gathers.
        messages: Number of collectives.
    """

    vectors: float
    dense: float
    packed: float
    reduced: float
    scattered: float
    messages: float

    @property
    def sent(self) -> float:
        """Bytes sent."""
        return self.reduced + self.scattered

    def terms(self) -> list[float]:
        """In the order of :data:`CONSTANTS`."""
        return [self.vectors, self.dense, self.packed, self.reduced, self.scattered, self.messages]


CONSTANTS = (
    "seconds per byte of vectors",
    "seconds per byte of dense directions",
    "seconds per byte of packed directions",
    "seconds per byte sent, all-reduce",
    "seconds per byte sent, reduce-scatter and all-gather",
    "seconds per collective",
)
BUCKET = 1 << 24


def cost(scheme: str, d: float, w: int, k: int, bits: int) -> Cost:
    """The model: each product reads the directions once; a pass over a vector is 4 D bytes.

    Args:
        scheme: Its name in the table, without the bits.
        d: Parameters.
        w: Processes.
        k: Directions.
        bits: Of a direction's entry.
    """
    ring, buckets = (w - 1) / w, math.ceil(d / BUCKET)
    per_entry = 4.0 if bits == 32 else bits / 8 + 2 / 128
    directions = 2 * k * d * per_entry  # read by project and by expand
    message = 8 * (k + 1) * 2 * ring
    if scheme == "DDP AdamW":  # flatten, average, and AdamW's seven
        return Cost(4 * d * 11, 0, 0, 4 * d * 2 * ring, 0, 1)
    if scheme == "FSDP AdamW":  # the reduce-scatter; AdamW's seven on a part
        return Cost(4 * d * 7 / w, 0, 0, 0, 4 * d * ring, 1)
    if scheme == "paper, rows":  # the slowest process has one row more where they do not divide
        return Cost(4 * d * 9, directions * math.ceil(k / w) / k, 0, 4 * d * 4 * ring, 0, 2)
    passes, share, scattered, messages = 3.0, 1.0, 0.0, 1
    if scheme == "shard":  # fill and empty the buckets
        passes, share, scattered = 6 + 3 / w, 1 / w, 4 * d * 2 * ring
        messages = 1 + 2 * buckets
    elif scheme == "local shards":  # with FSDP's own reduce-scatter
        passes, share, scattered, messages = 3 / w, 1 / w, 4 * d * ring, 2
    dense, packed = (directions, 0.0) if bits == 32 else (0.0, directions)
    return Cost(4 * d * passes, dense * share, packed * share, message, scattered, messages)


def fit(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Fit the model's constants to the measurements and say how well they agree."""
    from scipy.optimize import nnls

    terms, seconds, names = [], [], []
    for row in rows:
        scheme, _, rest = row["scheme"].partition(", ")
        scheme = row["scheme"] if scheme == "paper" else scheme
        bits = int(rest.split()[0]) if rest.endswith("bits") else 32
        modelled = cost(scheme, row["numel"], args.processes, args.candidates, bits)
        if not math.isclose(modelled.sent, row["sent"], rel_tol=0.1, abs_tol=8 * TILE):
            raise RuntimeError(
                f"{row['scheme']}: {modelled.sent:g} bytes modelled, not {row['sent']:g}"
            )
        for name, ms in row["ms"].items():
            link = 0.0 if name == "inf" else row["sent"] / (float(name) * 1e9 / 8)
            link += 0.0 if name == "inf" else row["messages"] * args.latency * 1e-6
            terms.append(modelled.terms())
            seconds.append(max(ms * 1e-3 - link, 1e-6))
            names.append((row["scheme"], row["numel"], name, ms * 1e-3, link))
    x = torch.tensor(terms, dtype=torch.float64)
    y = torch.tensor(seconds, dtype=torch.float64)
    constants, _ = nnls((x / y[:, None]).numpy(), torch.ones_like(y).numpy())
    print("\nFitted to the measurements (the simulated link taken off):\n")
    print("| constant | fitted |\n|---|---:|")
    for name, value in zip(CONSTANTS, constants, strict=True):
        print(f"| {name} | {value:.3g} |")
    print("\n| scheme | D | link | measured, ms | modelled, ms | error |")
    print("|---|---:|---:|---:|---:|---:|")
    for (scheme, numel, link_name, measured, link), row_terms in zip(names, terms, strict=True):
        modelled_s = link + sum(a * b for a, b in zip(row_terms, constants, strict=True))
        title = "loopback" if link_name == "inf" else f"{float(link_name):g} Gbit/s"
        print(f"| {scheme} | {numel:,} | {title} | {1e3 * measured:.1f} | {1e3 * modelled_s:.1f} | "
              f"{modelled_s / measured - 1:+.0%} |")  # fmt: skip


FAR = ("DDP AdamW", "paper, rows", "replicate", "shard", "FSDP AdamW", "local shards")


def state_bytes(scheme: str, d: float, w: int, k: int, bits: int) -> float:
    """What a GPU holds: weights, gradients, AdamW's two (which rest in the phase), directions."""
    entry = k * d * (bits / 8 + 2 / 128) + 4 * d  # and the center
    directions = {"paper, rows": 4 * math.ceil(k / w) * d, "replicate": entry}
    directions |= {"shard": entry / w, "local shards": entry / w}
    model = 16 * d / (w if scheme in ("FSDP AdamW", "local shards") else 1)
    return model + directions.get(scheme, 0.0)


def carry(args: argparse.Namespace) -> None:
    """The model with the constants of an assumed accelerator; nothing here is measured."""
    k, bits = args.far_candidates, args.bits
    print(
        f"\nA MODEL, NOT MEASURED: {k} directions of {bits} bits (32 in the paper's rows), global "
        f"coefficients; a GPU has {args.gpu_memory:g} GB at {args.gpu_bandwidth:g} GB/s, a link of "
        f"{args.link:g} GB/s; a collective takes {args.gpu_latency:g} microseconds times log2(W) "
        f"and its bytes; no overlap with the backward pass; - does not fit."
    )
    cells: dict[str, dict[tuple[float, int, str], str]] = {
        "State, GB a GPU": {},
        "Sent, GB a step and GPU": {},
        "Optimizer step and exchange, ms": {},
    }
    held, sent, times = cells.values()
    for d, w, scheme in itertools.product(args.far_numel, args.far_processes, FAR):
        found = cost(scheme, d, w, k, 32 if scheme == "paper, rows" else bits)
        state = state_bytes(scheme, d, w, k, bits)
        memory_time = (found.vectors + found.dense + found.packed) / args.gpu_bandwidth
        seconds = (memory_time + found.sent / args.link) * 1e-9
        seconds += found.messages * args.gpu_latency * 1e-6 * math.log2(w)
        fits = state <= args.gpu_memory * 1e9
        held[d, w, scheme] = f"{state / 1e9:.3g}"
        sent[d, w, scheme] = f"{found.sent / 1e9:.3g}"
        times[d, w, scheme] = f"{1e3 * seconds:.3g}" if fits else "-"
    for title, values in cells.items():
        print(f"\n{title}:\n\n| D | GPUs | {' | '.join(FAR)} |")
        print("|---:|---:" + "|---:" * len(FAR) + "|")
        for d, w in itertools.product(args.far_numel, args.far_processes):
            print(f"| {d:.0e} | {w} | {' | '.join(values[d, w, scheme] for scheme in FAR)} |")
