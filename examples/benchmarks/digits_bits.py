"""Does a low-bit basis cost accuracy? The digits example's TWA-t at several widths.

Every width trains on the same candidates (same seed, same first 30 epochs); differences are paired.
Prints a Markdown table.

    python examples/benchmarks/digits_bits.py            # 10 seeds, about 2 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

from lightning_twa import SubspaceConfig, TWACallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import digits

COLLECT, PHASE = 30, 5


class Error(L.Callback):
    """Notes the relative error of the basis that the phase trains in."""

    value = float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        (callback,) = (c for c in trainer.callbacks if isinstance(c, TWACallback))
        optimizer = callback._run.optimization.optimizer
        if optimizer is not None:
            self.value = optimizer.subspace.stored.error


def run(seed: int, bits: int) -> tuple[digits.Score, float]:
    """Test score and relative error of the basis."""
    L.seed_everything(seed, verbose=False)
    data, error = digits.Digits(seed), Error()
    model = digits.Classifier(lambda step: 1.0)
    twa = TWACallback(start_epoch=COLLECT, subspace=SubspaceConfig(bits=bits))
    digits.trainer(COLLECT + PHASE, twa, error).fit(model, datamodule=data)
    return digits.test(model, data), error.value


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seed-offset", type=int, default=10)
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 8, 4, 2, 1])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # Lightning's advice on tiny data, once per fit
    torch.set_num_threads(1)
    seeds = range(args.seed_offset, args.seed_offset + args.seeds)
    results: dict[int, list[tuple[digits.Score, float]]] = {bits: [] for bits in args.bits}
    for seed in seeds:
        for bits in args.bits:
            results[bits].append(run(seed, bits))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    print(f"TWA-t on digits, {args.seeds} seeds; differences to {args.bits[0]} bits are paired")
    print("| bits | relative error of the basis | accuracy (%) | NLL | accuracy difference |")
    print("|---|---|---|---|---|")
    exact = [score.accuracy for score, _ in results[args.bits[0]]]
    for bits, rows in results.items():
        accuracy = [score.accuracy for score, _ in rows]
        nll = statistics.mean(score.nll for score, _ in rows)
        error = statistics.mean(value for _, value in rows)
        difference = [a - b for a, b in zip(accuracy, exact, strict=True)]
        spread = statistics.stdev(difference) / len(difference) ** 0.5
        print(
            f"| {bits} | {error:.4f} | {statistics.mean(accuracy):.2f} | {nll:.4f} "
            f"| {statistics.mean(difference):+.2f} ± {spread:.2f} |"
        )


if __name__ == "__main__":
    main()
