"""What TWA adds to a checkpoint, and what it costs to take a candidate.

Prints two Markdown tables. A checkpoint is compared with that of the same run without the callback,
a candidate with one copy of the parameters; times are medians, and every ratio is from this run.

    python examples/benchmarks/checkpointing.py
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_twa import CollectConfig, StorageConfig, SubspaceConfig, TWACallback
from lightning_twa.candidates import Store

KINDS = {"memory": "memory", "files": "disk"}
CACHED = {f"{name}, subspace in a file": kind for name, kind in KINDS.items()}


class Model(L.LightningModule):
    """Linear layers, trained with AdamW."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean square of the output."""
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two moments beside each weight, as most users have."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Saver(L.Callback):
    """Writes checkpoints at the ends of some epochs, several times each; on request the run is
    interrupted after the last of them, so that it does not tidy up.
    """

    def __init__(
        self, folder: Path, moments: dict[int, str], rounds: int, interrupts: bool = False
    ) -> None:
        self.folder, self.moments, self.rounds = folder, moments, rounds
        self.interrupts = interrupts
        self.seconds: dict[str, float] = {}

    def path(self, moment: str) -> Path:
        """Where the checkpoint of a moment is."""
        return self.folder / f"{moment}.ckpt"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the callback's own work at the end of the epoch."""
        moment = self.moments.get(trainer.current_epoch)
        if moment is not None:
            save = lambda: trainer.save_checkpoint(self.path(moment))  # noqa: E731
            self.seconds[moment] = median_seconds(save, self.rounds)
            if self.interrupts and trainer.current_epoch == max(self.moments):
                raise Interrupted


class Interrupted(Exception):
    """A run that does not come to its end."""


class Started(Exception):
    """A resumed run has come to its first batch."""


class UntilFirstBatch(L.Callback):
    """Ends a run at its first batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Everything is restored."""
        raise Started


def median_seconds(action: Callable[[], object], rounds: int) -> float:
    """Median time of an action, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def fit(width: int, n: int, folder: Path, callbacks: list[Any], ckpt: Path | None = None) -> None:
    """A run of ``n + 2`` epochs of one batch."""
    data = DataLoader(TensorDataset(torch.randn(4, width)), batch_size=4)
    L.seed_everything(0, verbose=False)
    L.Trainer(
        accelerator="cpu",
        max_epochs=n + 2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(Model(width), data, ckpt_path=ckpt)


def checkpoints(width: int, n: int, rounds: int, bits: int, root: Path) -> list[str]:
    """The rows of the first table."""
    every = {n - 2: "collecting", n: "in the phase", n + 1: "finished"}
    rows = []
    plain: dict[str, list[float]] = {}
    for name, kind in {"warm-up": None, "plain": None, **KINDS, **CACHED}.items():
        folder = root / name
        folder.mkdir()

        def twa(name: str = name, kind: str | None = kind, folder: Path = folder) -> list[Any]:
            if kind is None:
                return []
            cached = name in CACHED
            where = str(folder / "candidates") if kind == "disk" or cached else None
            storage = StorageConfig(kind=kind, dirpath=where, cache_subspace=cached)  # type: ignore[arg-type]
            collect = CollectConfig(start=0, power_averages=())
            subspace = SubspaceConfig(bits=bits)  # type: ignore[arg-type]
            return [TWACallback(n, collect=collect, subspace=subspace, storage=storage)]

        moments = {n: "in the phase"} if name in CACHED else every
        saver = Saver(folder, moments, rounds, interrupts=name in CACHED)
        with contextlib.suppress(Interrupted):
            fit(width, n, folder, [*twa(), saver])

        def resume(moment: str) -> None:
            try:
                fit(width, n, folder, [*twa(), UntilFirstBatch()], saver.path(moment))  # noqa: B023
            except Started:
                return

        for moment in moments.values():
            measured = [saver.path(moment).stat().st_size / 1e6, saver.seconds[moment]]
            if moment != "finished":  # there is no next batch
                measured += [median_seconds(lambda m=moment: resume(m), rounds)]  # type: ignore[misc]
            if name == "plain":
                plain[moment] = measured
            elif name == "warm-up":  # memory and disk are slower at first
                continue
            cells = [
                f"{value:.{digits}f} | {value / reference:.2f}"
                for value, reference, digits in zip(
                    measured, plain[moment], (1, 3, 3), strict=False
                )
            ]
            cells += ["| "] * (3 - len(cells))
            rows.append(f"| {name} | {moment} | {' | '.join(cells)} |")
    return rows


def candidates(width: int, rounds: int, root: Path) -> list[str]:
    """The rows of the second table."""
    model = Model(width)
    copy = median_seconds(lambda: [p.detach().clone() for p in model.parameters()], 5 * rounds)
    numel = sum(p.numel() for p in model.parameters())
    rows = [f"| one copy of the parameters | {1e3 * copy:.1f} | 1.00 | {4 * numel / 1e6:.1f} |"]
    for name, kind in KINDS.items():
        for dtype in ("float32", "bfloat16"):
            store = Store(
                StorageConfig(kind=kind, dtype=dtype),  # type: ignore[arg-type]
                max_candidates=1,
                root=root / dtype,
            )
            names = iter(range(10**6))

            def take(store: Store = store, names: Any = names) -> None:
                store.add(model, f"step={next(names)}")
                store.settle()

            seconds = median_seconds(take, rounds)
            files = store.files
            size = files[1] if files is not None else store.nbytes
            rows.append(
                f"| {name}, {dtype} | {1e3 * seconds:.1f} | {seconds / copy:.2f} "
                f"| {size / 1e6:.1f} |"
            )
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=32, help="of the basis")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    numel = sum(p.numel() for p in Model(args.width).parameters())
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {numel:,} parameters, "
        f"{args.candidates} candidates, AdamW; a basis of {args.bits} bits"
    )
    with tempfile.TemporaryDirectory() as folder:
        print("\n| candidates in | moment | MB | ratio | save, s | ratio | resume, s | ratio |")
        print("|---|---|---|---|---|---|---|---|")
        for line in checkpoints(args.width, args.candidates, args.rounds, args.bits, Path(folder)):
            print(line, flush=True)
        print("\n| what | ms | ratio | MB |")
        print("|---|---|---|---|")
        for line in candidates(args.width, args.rounds, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
