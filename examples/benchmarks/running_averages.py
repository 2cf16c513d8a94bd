"""What running averages cost: an update beside a fused SGD step, and beside a training step.

Prints two Markdown tables; every ratio is of medians measured in this run, round by round in turn.

    python examples/benchmarks/running_averages.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import Classifier, Digits
from overhead import measure

from lightning_twa.candidates.running_averages import RunningAverages

DECAYS = (0.9, 0.97, 0.99, 0.995, 0.998)


def resnet18() -> nn.Module:
    """Parameters in the shapes of ResNet-18 for 10 classes, 11.2 million in 62 tensors."""
    model = nn.ParameterList()
    channels = 64
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    for out in (64, 128, 256, 512):
        for i in range(2):
            shapes += [(out, channels, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if i == 0 and out != channels:
                shapes += [(out, channels, 1, 1), (out,), (out,)]
            channels = out
    for shape in [*shapes, (10, 512), (10,)]:
        model.append(torch.randn(shape))
    return model


def updates_beside_steps(rounds: int) -> None:
    """One update against one fused step of SGD with momentum on 11.2 million parameters."""
    model = resnet18()
    count = sum(p.numel() for p in model.parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    banks = {n: RunningAverages(DECAYS[:n]) for n in (1, 5)}
    actions: dict[str, Callable[[], object]] = {"sgd": sgd.step}
    for n, bank in banks.items():
        bank.update(model)
        actions[str(n)] = lambda bank=bank: bank.update(model)
    t = measure(actions, rounds)
    print(f"\n{count:,} parameters\n")
    print("| averages | update, ms | fused SGD step, ms | ratio for each average |")
    print("|---:|---:|---:|---:|")
    for n in banks:
        each = t[str(n)] / n / t["sgd"]
        print(f"| {n} | {1e3 * t[str(n)]:.2f} | {1e3 * t['sgd']:.2f} | {each:.2f} |", flush=True)


class Watch(L.Callback):
    """Seconds from batch to batch, and of updates of running averages after each."""

    def __init__(self) -> None:
        self.banks = {n: RunningAverages(DECAYS[:n]) for n in (1, 5)}
        self.updates: dict[int, list[float]] = {n: [] for n in self.banks}
        self.steps: list[float] = []
        self.last: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take the time; updates are not part of the time from batch to batch."""
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        for n, bank in self.banks.items():
            began = time.perf_counter()
            bank.update(pl_module)
            self.updates[n].append(time.perf_counter() - began)
        self.last = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """What happens between epochs is no step."""
        self.last = None


def updates_beside_training(epochs: int) -> None:
    """One update against a step of the Trainer with the digits example."""
    torch.manual_seed(0)
    module, data = Classifier(lambda step: 0.1), Digits(0)
    watch = Watch()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # advice on workers
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(names, False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[watch], **off)
    trainer.fit(module, data.train_dataloader())
    step = statistics.median(watch.steps)
    print(f"\n{sum(p.numel() for p in module.parameters()):,} parameters, digits\n")
    print("| averages | update, ms | step of the Trainer, ms | update / step | for each average |")
    print("|---:|---:|---:|---:|---:|")
    for n, times in watch.updates.items():
        update = statistics.median(times)
        print(
            f"| {n} | {1e3 * update:.3f} | {1e3 * step:.2f} | {100 * update / step:.1f} % "
            f"| {100 * update / step / n:.1f} % |",
            flush=True,
        )


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    updates_beside_steps(rounds)
    updates_beside_training(epochs=2 * rounds)


if __name__ == "__main__":
    main()
