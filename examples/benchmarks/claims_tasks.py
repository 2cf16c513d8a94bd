"""The tasks of the claims benchmark: models, recipes, and how they are trained.

First weights depend on the seed only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from claims_data import (
    CONTEXT,
    Batch,
    Data,
    add_noise,
    digits,
    move,
    shuffled,
    sources,
    unchanged,
)
from claims_larger import fashion, residual_net, stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_twa import TWACallback

# --- models


class Block(nn.Module):
    """A pre-norm layer with four heads; half the time of ``nn.TransformerEncoderLayer`` here."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, tokens, width), as the result."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two layers. Causal: logits of the next bytes; else of an image, by its 2x2 patches."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, causal: bool, out: int) -> None:
        super().__init__()
        self.embed, self.causal = embed, causal
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(Block(width, causal), Block(width, causal))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, out), or (batch, tokens, out) when causal."""
        x = self.embed(x if self.causal else F.unfold(x, 2, stride=2).mT)
        x = self.norm(self.layers(x + self.position))
        return self.head(x if self.causal else x.mean(dim=1))


def cnn(classes: int) -> nn.Sequential:
    """Four convolutions with BatchNorm; 16.8k parameters for ten classes."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(1, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def mlp() -> nn.Module:
    """Two hidden layers of 64, without normalisation."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def cosine(done: float) -> float:
    """From one to zero over the schedule."""
    return 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0))


def halves(done: float) -> float:
    """A tenth from half of the schedule on, a hundredth from three quarters on."""
    return 0.1 ** ((done >= 0.5) + (done >= 0.75))


@dataclass(frozen=True)
class Recipe:
    """How to train: ``schedule`` maps the share of the training done to one of the rate, which
    rises over the first ``warmup`` steps.
    """

    optimizer: Callable[..., Optimizer]
    schedule: Callable[[float], float] = cosine
    label_smoothing: float = 0.0
    warmup: int = 1


class Learner(L.LightningModule):
    """A classifier; ``steps`` is the length of the full schedule in optimizer steps."""

    def __init__(self, net: nn.Module, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.net, self.recipe, self.steps = net, recipe, steps

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy."""
        logits, labels = self(batch[0]).flatten(0, -2), batch[1].flatten()
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def configure_optimizers(self) -> Any:
        """The full schedule, step by step."""
        optimizer = self.recipe.optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                self.recipe.schedule(step / self.steps) * min(1.0, (step + 1) / self.recipe.warmup)
            ),
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(module: Learner, data: Data, epochs: int, callbacks: Sequence[L.Callback] = ()) -> float:
    """Train on the CPU and print nothing; returns the seconds it took."""
    val: Any = shuffled(data.val, 50, 0, unchanged)  # what TWACallback takes for held-out data
    if any(isinstance(c, TWACallback) and c.settings.data == "val" for c in callbacks):
        val = DataLoader(data.val, 50)  # it holds a part of them back, of a loader it knows
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(options, False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on workers and on having no validation_step
            trainer = L.Trainer(
                accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **off
            )
            began = time.perf_counter()
            trainer.fit(module, data.train, val)
            return time.perf_counter() - began
    finally:
        logger.setLevel(level)


# --- tasks


@dataclass(frozen=True)
class Options:
    """What the command line says about the tasks."""

    fashion: str | None = None
    fashion_epochs: int = 30
    fashion_width: int = 16
    stream_steps: int = 2000
    stream_width: int = 64


@dataclass(frozen=True)
class Task:
    """A kind of run: ``data`` and ``net`` are made from a seed, an epoch has ``steps`` batches.

    The runs that are compared are the first ``run`` epochs of a schedule for ``epochs``; candidates
    and windows are of the weights after every ``every`` steps, by default at the ends of epochs.
    """

    name: str
    data: Callable[[int], Data]
    net: Callable[[int], nn.Module]
    recipe: Recipe
    steps: int
    epochs: int = 60
    run: int = 30
    every: int | None = None
    kind: str = "main"  # or "noise", "rate"
    words: str = ""

    @property
    def total(self) -> int:
        """Optimizer steps of a run."""
        return self.run * self.steps

    @property
    def interval(self) -> int:
        """Steps between two snapshots."""
        return self.every or self.steps

    def module(self, seed: int, recipe: Recipe | None = None, steps: int | None = None) -> Learner:
        """A module to train from the start; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Learner(self.net(seed), recipe or self.recipe, steps or self.epochs * self.steps)


@functools.cache
def pretrained(name: str, seed: int) -> nn.Module:
    """The digits 0 to 4 for ``"digits"``, the library's sources for ``"language"``; to be copied.

    The language model's windows are those of another seed, of the same training files.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 500)
        net = cnn(5) if name == "digits" else language_model(48)
    if name == "digits":
        data = digits(seed, (600, 10), 50, 0.3, move, classes=range(5))
        recipe, epochs = Recipe(partial(AdamW, lr=3e-3)), 8
    else:
        data = sources(seed, 16, 60)
        data.train.seed += 500
        recipe, epochs = Recipe(partial(AdamW, lr=1e-2, weight_decay=0.1)), 10
    fit(Learner(net, recipe, epochs * len(data.train)), data, epochs)
    return net


def language_model(width: int) -> nn.Module:
    """Of bytes."""
    return Transformer(nn.Embedding(256, width), CONTEXT, width, causal=True, out=256)


def transfer_net(seed: int) -> nn.Module:
    """A CNN that knows the digits 0 to 4, with a new last layer."""
    net = copy.deepcopy(pretrained("digits", seed))
    net[-1].reset_parameters()
    return net


DIGITS = (
    Task(
        "digits-cnn",
        lambda seed: digits(seed, (400, 80), 50, 0.3, move),
        lambda seed: cnn(10),
        Recipe(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4), halves),
        steps=8,
        words="400 noisy 8x8 digits, a CNN with BatchNorm; SGD, whose rate falls after the run",
    ),
    Task(
        "digits-vit",
        lambda seed: digits(seed, (800, 100), 50, 0.1, add_noise),
        lambda seed: Transformer(nn.Linear(4, 32), 16, 32, causal=False, out=10),
        Recipe(partial(AdamW, lr=4e-3, weight_decay=0.1)),
        steps=16,
        words="800 digits, a small vision transformer; AdamW, half of a cosine",
    ),
    Task(
        "language",
        lambda seed: sources(seed, 8, 15),
        lambda seed: copy.deepcopy(pretrained("language", seed)),
        Recipe(partial(AdamW, lr=1e-2, weight_decay=0.1)),
        steps=15,
        words="a byte-level transformer goes on with the standard library's sources; AdamW, half "
        "of a cosine",
    ),
    Task(
        "digits-transfer",
        lambda seed: digits(seed, (150, 60), 25, 0.3, move, classes=range(5, 10)),
        transfer_net,
        Recipe(partial(AdamW, lr=3e-3, weight_decay=0.05)),
        steps=6,
        words="a CNN that knows the digits 0 to 4, fine-tuned on 150 images of 5 to 9; AdamW, "
        "half of a cosine",
    ),
)
RATES = (0.25, 0.5, 2.0, 4.0)  # factors of the learning rate


def noisy(percent: int, clean_validation: bool = False) -> Task:
    """Digits some of whose labels, for training and validation, are drawn at random."""
    words = f"800 digits, {percent} % of the labels drawn at random, an MLP; SGD, half of a cosine"
    wrong = percent / 100
    return Task(
        f"noise-{percent}" + ("-clean" if clean_validation else ""),
        lambda seed: digits(
            seed, (800, 150), 50, 0.1, wrong=wrong, clean_validation=clean_validation
        ),
        lambda seed: mlp(),
        Recipe(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)),
        steps=16,
        kind="noise",
        words=words + ("; those held out are right" if clean_validation else ""),
    )


def at_rate(task: Task, factor: float) -> Task:
    """The task with another learning rate."""
    make = task.recipe.optimizer
    assert isinstance(make, functools.partial)
    optimizer = partial(make.func, **{**make.keywords, "lr": factor * make.keywords["lr"]})
    recipe = dataclasses.replace(task.recipe, optimizer=optimizer)
    return dataclasses.replace(task, name=f"{task.name} x{factor}", recipe=recipe, kind="rate")


def fashion_task(options: Options, percent: int) -> Task:
    """Of the folder that the options name; with noise a percentage of the labels is random."""
    folder, width, epochs = options.fashion, options.fashion_width, options.fashion_epochs
    assert folder is not None
    noise = f", {percent} % of the labels drawn at random" if percent else ""
    return Task(
        f"fashion-noise-{percent}" if percent else "fashion",
        lambda seed: fashion(folder, seed, (10_000, 500), percent / 100),
        lambda seed: residual_net(width),
        Recipe(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4), halves),
        steps=100,
        epochs=epochs,
        run=epochs // 2,
        kind="noise" if percent else "main",
        words=f"10,000 images of Fashion-MNIST{noise}, a residual CNN of width {width}; SGD, whose "
        "rate falls after the run",
    )


def stream_task(options: Options) -> Task:
    """One epoch, in which every batch is new."""
    steps, width = options.stream_steps, options.stream_width
    size = steps * 32 * (CONTEXT + 1) / 1e6
    return Task(
        "stream",
        lambda seed: stream(seed, 32, steps),
        lambda seed: language_model(width),
        Recipe(partial(AdamW, lr=4e-3, weight_decay=0.1), lambda done: 1.0, warmup=100),
        steps=steps,
        epochs=1,
        run=1,
        every=max(1, steps // 32),
        words=f"one pass over {size:.1f} MB of source text of installed packages, a byte-level "
        f"transformer of width {width}; AdamW at a constant rate",
    )


@functools.cache
def tasks(options: Options) -> dict[str, Task]:
    """All of them by name; those of Fashion-MNIST where there is a folder."""
    found = [*DIGITS, stream_task(options), *(noisy(percent) for percent in (0, 20, 40, 60))]
    found.append(noisy(40, clean_validation=True))
    found += [at_rate(task, factor) for task in DIGITS[:2] for factor in RATES]
    if options.fashion is not None:
        found += [fashion_task(options, percent) for percent in (0, 20, 40, 60)]
    return {task.name: task for task in found}
