"""Runs of the claims benchmark: ordinary training that leaves its weights in files, and scores.

Scores are accuracy in percent and NLL in nats.

    python examples/benchmarks/claims_runs.py all --seed 1        # are the tasks sound?
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from claims_data import Data, generator_of, soup_data
from claims_tasks import TASKS, Learner, Recipe, Task, fit, pretrained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.swa_utils import update_bn

from lightning_twa.candidates import RunningAverages

EMA_DECAYS = (0.9, 0.97, 0.99)  # of the baselines, per optimizer step
BANK = (0.9, 0.97, 0.99, 0.995, 0.998)  # of CollectConfig.ema_decays
START = 30  # epochs of ordinary training before the phase
BANK_START = START // 2  # where the callback begins to collect
SOUP_RUNS = 12

# --- runs


class Recorder(L.Callback):
    """Saves weights, buffers and running averages after every epoch, and some checkpoints.

    The averages are plain: ``a = d a + (1 - d) w`` from zero, divided by ``1 - d^t``.
    """

    def __init__(self, folder: Path, checkpoints: Collection[int]) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.averages: dict[float, dict[str, Tensor]] = {d: {} for d in EMA_DECAYS}
        self.updates = 0
        self.bank = RunningAverages(BANK)  # as the callback keeps them

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Update the averages."""
        if trainer.current_epoch >= BANK_START:
            self.bank.update(pl_module)
        self.updates += 1
        for decay, average in self.averages.items():
            for name, w in pl_module.named_parameters():
                before = average.get(name, torch.zeros_like(w))
                average[name] = decay * before + (1 - decay) * w

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Epochs count from 0."""
        epoch, state = trainer.current_epoch, pl_module.state_dict()
        torch.save(state, self.folder / f"epoch={epoch}.pt")
        for decay, average in self.averages.items():
            unbiased = {name: w / (1 - decay**self.updates) for name, w in average.items()}
            torch.save({**state, **unbiased}, self.folder / f"ema={decay}-epoch={epoch}.pt")
        for i, decay in enumerate(BANK if epoch + 1 == START else ()):
            torch.save({**state, **self.bank.weights(i)}, self.folder / f"bank={decay}.pt")
        if epoch in self.checkpoints:
            trainer.save_checkpoint(self.folder / f"epoch={epoch}.ckpt")


class Drop(L.Callback):
    """Anneals the learning rate linearly, from what it is to 0, whatever the scheduler says."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.start: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """The scheduler has set its own rates since the last call."""
        groups = trainer.optimizers[0].param_groups
        self.start = self.start or [group["lr"] for group in groups]
        for group, lr in zip(groups, self.start, strict=True):
            group["lr"] = lr * (1 - self.done / self.steps)
        self.done += 1


def base_run(
    task: Task,
    seed: int,
    folder: Path,
    until: int | None = None,
    callbacks: Sequence[L.Callback] = (),
    checkpoints: Collection[int] = (),
) -> None:
    """Save a state dict after every epoch, counted from 0, in ``folder/"epoch=<e>.pt"``.

    ``until`` stops after so many epochs of the same schedule; after each epoch in
    ``checkpoints``, Lightning's complete checkpoint goes to ``folder/"epoch=<e>.ckpt"``.
    """
    epochs = task.epochs if until is None else until
    recorder = Recorder(folder, checkpoints)
    fit(task.module(seed), task.data(seed), epochs, [*callbacks, recorder])


def lr_drop(task: Task, seed: int, ckpt: Path, epochs: int) -> Learner:
    """Go on from a checkpoint, the learning rate falling linearly to 0 in so many epochs."""
    module, data = task.module(seed), task.data(seed)
    done = torch.load(ckpt, weights_only=True)["epoch"] + 1
    fit(module, data, done + epochs, [Drop(epochs * len(data.train))], ckpt)
    return module


def reestimate(module: nn.Module, data: Data) -> None:
    """Take BatchNorm statistics, if there are any, from the training data of epoch 0."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        update_bn(data.train.batches(0), module)


def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and NLL in nats, in eval mode and float32."""
    training, correct, nll = module.training, 0.0, 0.0
    module.eval()
    with torch.no_grad():
        for inputs, labels in zip(x.split(250), y.split(250), strict=True):
            logits, target = module(inputs).float().flatten(0, -2), labels.flatten()
            correct += (logits.argmax(dim=1) == target).sum().item()
            nll += F.cross_entropy(logits, target, reduction="sum").item()
    module.train(training)
    return 100 * correct / y.numel(), nll / y.numel()


def load(path: Path) -> dict[str, Tensor]:
    """Weights that a run saved."""
    return torch.load(path, weights_only=True)


def uniform(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average with equal weights; integers, such as BatchNorm's counts, are the last's."""
    return {
        name: sum(state[name] for state in states) / len(states) if x.is_floating_point() else x
        for name, x in states[-1].items()
    }


def soup_net(seed: int) -> Learner:
    """The module to load weights of soup runs, or an average of them, into."""
    return TASKS["language"].module(seed)


def soup_run(seed: int, i: int, settings: dict[str, float], data: Data) -> Learner:
    """Fine-tune the language model once; each run sees other windows of the same text."""
    optimizer = partial(AdamW, lr=settings["lr"], weight_decay=settings["weight_decay"])
    recipe = Recipe(optimizer, label_smoothing=settings["smoothing"])
    epochs = int(settings["epochs"])
    start = copy.deepcopy(pretrained("language", seed))
    module = Learner(start, recipe, epochs * len(data.train))
    data.train.seed = SOUP_RUNS * seed + i
    fit(module, data, epochs)
    return module


def soup_runs(seed: int, folder: Path) -> None:
    """Fine-tune a language model 12 times, with random settings, on Python's manual.

    Writes the weights, ``folder/"run=<i>.pt"``, and ``folder/"runs.json"``, a list of settings
    and validation scores.
    """
    data = soup_data(seed)
    rows = torch.rand(SOUP_RUNS, 4, generator=generator_of(seed, 1004)).tolist()
    runs: list[dict[str, float]] = []
    for i, (a, b, c, d) in enumerate(rows):
        settings = {
            "lr": 10 ** (0.7 * a - 2.7),  # 0.002 to 0.01
            "weight_decay": 10 ** (3 * b - 4),  # 0.0001 to 0.1
            "smoothing": 0.1 * c,
            "epochs": 3 + int(5 * d),
        }
        module = soup_run(seed, i, settings, data)
        torch.save(module.state_dict(), folder / f"run={i}.pt")
        accuracy, nll = evaluate(module, *data.val.tensors)
        runs.append({**settings, "accuracy": accuracy, "nll": nll})
    (folder / "runs.json").write_text(json.dumps(runs, indent=2))


# --- are the tasks sound?


def check(name: str, seed: int, folder: Path) -> None:
    """Run a task and print the scores that show whether it is sound."""
    began = time.perf_counter()
    if name == "language-soup":
        soup_runs(seed, folder)
        module, data = soup_net(seed), soup_data(seed)
        rows = {f"run {i}": [load(folder / f"run={i}.pt")] for i in range(SOUP_RUNS)}
        seconds = time.perf_counter() - began
        rows["uniform soup"] = [state for states in rows.values() for state in states]
    else:
        task = TASKS[name]
        module, data, half = task.module(seed), task.data(seed), task.epochs // 2
        began = time.perf_counter()  # pre-training is over, and is shared by the runs of a seed
        base_run(task, seed, folder, checkpoints=[half - 1])
        seconds = time.perf_counter() - began
        states = [load(folder / f"epoch={epoch}.pt") for epoch in range(task.epochs)]
        rows = {f"epoch {half - 1}": [states[half - 1]]}
        rows[f"uniform {half // 2} to {half - 1}"] = states[half // 2 : half]
        rows[f"epoch {task.epochs - 1}"] = [states[-1]]
        dropped = lr_drop(task, seed, folder / f"epoch={half - 1}.ckpt", 5)
        rows[f"epoch {half + 4}, lr to 0"] = [dropped.state_dict()]
    print(f"\n{name}, seed {seed}: {seconds:.1f} s\n")
    print("| weights | val. accuracy (%) | val. NLL | test accuracy (%) | test NLL |")
    print("|---|---:|---:|---:|---:|")
    for title, states in rows.items():
        module.load_state_dict(uniform(states))
        if len(states) > 1:
            reestimate(module, data)
        (va, vn), (ta, tn) = (evaluate(module, *d.tensors) for d in (data.val, data.test))
        print(f"| {title} | {va:.2f} | {vn:.3f} | {ta:.2f} | {tn:.3f} |", flush=True)


def main() -> None:
    """Check the task that the command line names."""
    names = [*TASKS, "language-soup"]
    parser = argparse.ArgumentParser(description="Run a task of the claims benchmark.")
    parser.add_argument("task", choices=[*names, "all"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in names if arguments.task == "all" else [arguments.task]:
        with tempfile.TemporaryDirectory() as folder:
            check(name, arguments.seed, Path(folder))


if __name__ == "__main__":
    main()
