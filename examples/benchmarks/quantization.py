"""Error of the packed basis: on normal data against Lloyd-Max, and on the candidates of a real run.

Beside it the paper's scheme (minimum to maximum of a block's row). Prints two Markdown tables.

    python examples/benchmarks/quantization.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace.directions.codec import GROUP, dequantize, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import digits

# Root mean square error of the Lloyd-Max quantizer of a standard normal (Max 1960).
LLOYD_MAX = {1: 0.603, 2: 0.343, 3: 0.186, 4: 0.0975, 5: 0.0500, 6: 0.0253, 7: 0.0128, 8: 0.00643}


def min_max(rows: Tensor, bits: int) -> Tensor:
    """The paper's scheme: ``2**bits`` levels from a row's minimum to its maximum."""
    low = rows.amin(1, keepdim=True)
    step = (rows.amax(1, keepdim=True) - low) / (2**bits - 1)
    step = step.clamp_min(torch.finfo(rows.dtype).tiny)
    return low + step * ((rows - low) / step).round()


def ours(rows: Tensor, bits: int) -> Tensor:
    """What this package keeps of rows whose length is a multiple of the group's."""
    groups = rows.unflatten(1, (-1, GROUP))
    codes, scales = quantize(groups, bits)
    return dequantize(codes, scales, bits, rows.dtype).flatten(1)


def relative(stored: Tensor, rows: Tensor) -> float:
    """Root mean square error in units of the root mean square."""
    return float((stored - rows).norm() / rows.norm())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=1 << 17)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the digits run")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    rows = torch.randn(20, args.columns // GROUP * GROUP, dtype=torch.float64)
    print(f"Standard normal, 20 rows of {rows.shape[1]:,} columns, relative error")
    print("| bits | Lloyd-Max | this package | ratio | min-max per row (paper) |")
    print("|---|---|---|---|---|")
    for bits in range(1, 9):
        error = relative(ours(rows, bits), rows)
        paper = relative(min_max(rows, bits), rows)
        best = LLOYD_MAX[bits]
        print(f"| {bits} | {best:.4f} | {error:.4f} | {error / best:.3f} | {paper:.4f} |")

    candidates = digits_candidates(args.epochs)
    print(f"\nDirections of {len(candidates)} candidates of the digits run, relative error")
    print("| bits | pca | candidates | candidates, per tensor | min-max per tensor (paper) |")
    print("|---|---|---|---|---|")
    exact = {k: [c[k].double() for c in candidates] for k in candidates[0]}
    for bits in range(1, 9):
        ours_here = [
            build_subspace(candidates, SubspaceConfig(bits=bits, **how)).stored.error
            for how in (
                {"basis": "pca"},
                {"basis": "candidates"},
                {"basis": "candidates", "blocks": "tensor"},
            )
        ]
        squares = [0.0, 0.0]
        for values in exact.values():
            u = torch.stack([v.reshape(-1) for v in values])
            u = u - u.mean(0)
            u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-300)
            squares[0] += float((min_max(u, bits) - u).square().sum())
            squares[1] += float(u.square().sum())
        paper = (squares[0] / squares[1]) ** 0.5
        print(f"| {bits} | " + " | ".join(f"{e:.4f}" for e in ours_here) + f" | {paper:.4f} |")


class Keep(L.Callback):
    """Copies the parameters at the end of each epoch."""

    def __init__(self) -> None:
        self.candidates: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = pl_module.named_parameters()
        self.candidates.append({name: p.detach().clone() for name, p in named})


def digits_candidates(epochs: int) -> list[dict[str, Tensor]]:
    """Weights at the ends of the second half of the epochs of the digits example's training."""
    keep = Keep()
    digits.trainer(epochs, keep).fit(digits.Classifier(lambda step: 1.0), digits.Digits(seed=0))
    return keep.candidates[epochs // 2 :]


if __name__ == "__main__":
    main()
