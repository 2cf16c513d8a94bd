"""The tasks of the claims benchmark: models, recipes, and how they are trained.

First weights depend on the seed only.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

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
    """How to train: ``schedule`` maps the share of the training done to one of the rate."""

    optimizer: Callable[..., Optimizer]
    schedule: Callable[[float], float] = cosine
    label_smoothing: float = 0.0


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
            optimizer, lambda step: self.recipe.schedule(step / self.steps)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(
    module: Learner,
    data: Data,
    epochs: int,
    callbacks: Sequence[L.Callback] = (),
    ckpt: Path | None = None,
) -> None:
    """Train on the CPU and print nothing; ``epochs`` include those before the checkpoint."""
    val = shuffled(data.val, 50, 0, unchanged)  # for TWACallback(data="val")
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
            trainer.fit(module, data.train, val, ckpt_path=ckpt)
    finally:
        logger.setLevel(level)


# --- tasks


@dataclass(frozen=True)
class Task:
    """A kind of run: ``data`` and ``net`` are made from a seed, an epoch has ``steps`` batches."""

    name: str
    data: Callable[[int], Data]
    net: Callable[[int], nn.Module]
    recipe: Recipe
    batch_size: int
    steps: int
    epochs: int = 60

    def module(self, seed: int) -> Learner:
        """A module to train from the start; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Learner(self.net(seed), self.recipe, self.epochs * self.steps)


@functools.cache
def pretrained(name: str, seed: int) -> nn.Module:
    """The digits 0 to 4 for ``"digits"``, the library's sources for ``"language"``; to be copied.

    The language model's windows are those of another seed, of the same training files.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 500)
        net = (
            cnn(5)
            if name == "digits"
            else Transformer(nn.Embedding(256, 48), CONTEXT, 48, causal=True, out=256)
        )
    if name == "digits":
        data = digits(seed, (600, 10), 50, 0.3, move, classes=range(5))
        recipe, epochs = Recipe(partial(AdamW, lr=3e-3)), 8
    else:
        data = sources(seed, 16, 60)
        data.train.seed += 500
        recipe, epochs = Recipe(partial(AdamW, lr=1e-2, weight_decay=0.1)), 10
    fit(Learner(net, recipe, epochs * len(data.train)), data, epochs)
    return net


def transfer_net(seed: int) -> nn.Module:
    """A CNN that knows the digits 0 to 4, with a new last layer."""
    net = copy.deepcopy(pretrained("digits", seed))
    net[-1].reset_parameters()
    return net


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits-cnn",
            lambda seed: digits(seed, (400, 80), 50, 0.3, move),
            lambda seed: cnn(10),
            Recipe(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4), halves),
            batch_size=50,
            steps=8,
        ),
        Task(
            "digits-vit",
            lambda seed: digits(seed, (800, 100), 50, 0.1, add_noise),
            lambda seed: Transformer(nn.Linear(4, 32), 16, 32, causal=False, out=10),
            Recipe(partial(AdamW, lr=4e-3, weight_decay=0.1)),
            batch_size=50,
            steps=16,
        ),
        Task(
            "language",
            lambda seed: sources(seed, 8, 15),
            lambda seed: copy.deepcopy(pretrained("language", seed)),
            Recipe(partial(AdamW, lr=1e-2, weight_decay=0.1)),
            batch_size=8,
            steps=15,
        ),
        Task(
            "digits-mlp-noisy",
            lambda seed: digits(seed, (800, 150), 50, 0.1, wrong=0.2),
            lambda seed: mlp(),
            Recipe(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)),
            batch_size=50,
            steps=16,
        ),
        Task(
            "digits-transfer",
            lambda seed: digits(seed, (150, 60), 25, 0.3, move, classes=range(5, 10)),
            transfer_net,
            Recipe(partial(AdamW, lr=3e-3, weight_decay=0.05)),
            batch_size=25,
            steps=6,
        ),
    )
}
