"""What the bits of the basis are worth in main memory: the peak of a whole run, to its end.

Prints a Markdown table. Each run has a process of its own, whose largest resident set is asked for
at the end; candidates are in files, whose pages count while they are mapped.

    python examples/benchmarks/peak_memory.py
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_twa import CollectConfig, StorageConfig, SubspaceConfig, TWACallback

TO_MB = 1 / 1e3 if sys.platform != "darwin" else 1 / 1e6  # Linux counts in kilobytes
STEPS = 4  # of the phase


class Model(L.LightningModule):
    """Linear layers, trained with SGD."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Another direction in each step, so that candidates span as many as there are."""
        output = self.layers(batch[0])
        return (output * torch.randn_like(output)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without a state of its own."""
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def run(bits: int, width: int, n: int) -> float:
    """Peak of this process in MB, once it has trained; with ``bits=0`` without the callback."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_twa").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = DataLoader(TensorDataset(torch.randn(4 * STEPS, width)), batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[L.Callback] = []
        if bits:
            callbacks.append(
                TWACallback(
                    n,
                    collect=CollectConfig(start=0, max_candidates=None, power_averages=()),
                    subspace=SubspaceConfig(bits=bits),  # type: ignore[arg-type]
                    storage=StorageConfig(kind="disk", dirpath=folder),
                )
            )
        L.seed_everything(0, verbose=False)
        L.Trainer(
            accelerator="cpu",
            max_epochs=n + 1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(Model(width), data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * TO_MB


def peak(bits: int, width: int, n: int, rounds: int) -> float:
    """Median over processes."""
    command = [sys.executable, __file__, "--width", str(width), "--candidates", str(n)]
    peaks = []
    for _ in range(rounds):
        done = subprocess.run(
            [*command, "--one", str(bits)], capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout.split()[-1]))
    return statistics.median(peaks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 16, 8, 4, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, help="run with so many bits here, and print the peak")
    args = parser.parse_args()
    if args.one is not None:
        print(run(args.one, args.width, args.candidates))
        return
    numel = sum(p.numel() for p in Model(args.width).parameters())
    print(f"{numel:,} parameters, {args.candidates} candidates in files, torch {torch.__version__}")
    print("\n| bits | peak, MB | less than at the first, MB | numbers of the basis, MB |")
    print("|---|---|---|---|")
    plain = peak(0, args.width, args.candidates, args.rounds)
    print(f"| no callback | {plain:.0f} | | |", flush=True)
    first = 0.0
    for bits in args.bits:
        found = peak(bits, args.width, args.candidates, args.rounds)
        first = first or found
        basis = (args.candidates - 1) * numel * bits / 8e6
        print(f"| {bits} | {found:.0f} | {first - found:.0f} | {basis:.0f} |", flush=True)


if __name__ == "__main__":
    main()
