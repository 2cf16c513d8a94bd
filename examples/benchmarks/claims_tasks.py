"""The tasks of the claims benchmark, on real data that ships with scikit-learn and Python.

Batches depend on (seed, epoch) only, first weights on the seed; a run that stops early is the
first part of the full one.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
CONTEXT = 64  # bytes of a window of text


def generator_of(seed: int, number: int) -> torch.Generator:
    """Numbers of its own for each pair of small integers."""
    return torch.Generator().manual_seed(1009 * seed + number)


# --- data


class Loader:
    """Runs ``draw``, which makes the batches of an epoch, with a generator for each epoch."""

    def __init__(
        self, draw: Callable[[torch.Generator], Iterator[Batch]], steps: int, seed: int
    ) -> None:
        self.draw, self.steps, self.seed = draw, steps, seed
        self.epoch = 0

    @property
    def sampler(self) -> Loader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iterating gives."""
        self.epoch = epoch

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, whichever is chosen."""
        return self.draw(generator_of(self.seed, epoch))

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches(self.epoch)  # lazy: a resumed run sets the epoch after iter()

    def __len__(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Data:
    """Of a task and seed; ``val.tensors`` and ``test.tensors`` are inputs and labels."""

    train: Loader
    val: TensorDataset
    test: TensorDataset


def unchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation."""
    return images


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 30 degrees and shift by up to a pixel, nearest neighbours."""
    angle, *shift = (2 * torch.rand(3, len(images), generator=generator) - 1).unbind()
    cos, sin = torch.cos(angle * math.radians(30)), torch.sin(angle * math.radians(30))
    x, y = (s * 2 / images.shape[-1] for s in shift)  # the grid is 2 wide
    theta = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise of standard deviation 0.1."""
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def shuffled(dataset: TensorDataset, batch_size: int, seed: int, augment: Augment) -> Loader:
    """Batches of a data set in random order."""
    x, y = dataset.tensors

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            yield augment(x[index], generator), y[index]

    return Loader(draw, math.ceil(len(x) / batch_size), seed)


def digits(
    seed: int,
    sizes: tuple[int, int],
    batch_size: int,
    noise: float,
    augment: Augment = unchanged,
    wrong: float = 0.0,
    classes: Sequence[int] = range(10),
) -> Data:
    """Digits of consecutive classes, which are labelled from 0; what is left over is for testing.

    ``sizes`` are images for training and validation, ``wrong`` is the share of training labels
    drawn at random. Pixels from 0 to 1 get noise once, but ``add_noise`` gets clean ones.
    """
    generator = generator_of(seed, 1001)
    bunch = load_digits()
    x, y = torch.tensor(bunch.images).float().unsqueeze(1) / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=generator)
    order = order[torch.isin(y[order], torch.tensor(classes))]
    x, y = x[order], y[order] - min(classes)
    train = sizes[0]
    start = train if augment is add_noise else 0
    x[start:] += noise * torch.randn(x[start:].shape, generator=generator)
    replaced = torch.rand(train, generator=generator) < wrong
    labels = torch.randint(len(classes), (train,), generator=generator)
    y[:train] = torch.where(replaced, labels, y[:train])
    split = [*sizes, len(x) - sum(sizes)]
    parts = [TensorDataset(*part) for part in zip(x.split(split), y.split(split), strict=True)]
    return Data(shuffled(parts[0], batch_size, seed, augment), parts[1], parts[2])


def as_bytes(contents: Sequence[bytes]) -> Tensor:
    """Texts, joined; dtype uint8."""
    return torch.frombuffer(bytearray(b"\n".join(contents)), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor) -> Batch:
    """Windows of a text and, as labels, the next bytes; the shape of starts plus (CONTEXT,)."""
    index = starts.unsqueeze(-1) + torch.arange(CONTEXT)
    return text[index].long(), text[index + 1].long()


def texts(parts: Sequence[Tensor], batch_size: int, steps: int, seed: int) -> Data:
    """Random windows for training; evenly spaced ones for validation and testing."""
    train, val, test = parts

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        size = (steps, batch_size)
        starts = torch.randint(len(train) - CONTEXT, size, generator=generator)
        yield from (windows(train, batch) for batch in starts)

    def spaced(text: Tensor, count: int) -> TensorDataset:
        return TensorDataset(*windows(text, torch.linspace(0, len(text) - 65, count).long()))

    return Data(Loader(draw, steps, seed), spaced(val, 310), spaced(test, 1500))


def sources(seed: int, batch_size: int, steps: int) -> Data:
    """The standard library's modules, split by file: 70 % training, 10 % validation, 20 % test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.name)
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    order = torch.randperm(len(files), generator=generator_of(seed, 1002)).tolist()
    contents = [files[i].read_bytes() for i in order]
    a, b = int(0.7 * len(files)), int(0.8 * len(files))
    parts = [as_bytes(part) for part in (contents[:a], contents[a:b], contents[b:])]
    return texts(parts, batch_size, steps, seed)


def soup_data(seed: int, with_validation: bool = False) -> Data:
    """Python's manual in random chunks: 60k bytes for training, 20k for validation, the rest.

    With ``with_validation`` the validation bytes are for training too, in longer epochs.
    """
    text = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py").read_bytes()
    chunks = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    order = torch.randperm(len(chunks), generator=generator_of(seed, 1003)).tolist()
    joined = as_bytes([chunks[i] for i in order])
    train, val, test = joined.split([60_000, 20_000, len(joined) - 80_000])
    if with_validation:
        return texts([joined[:80_000], val, test], 16, 77, seed)
    return texts([train, val, test], 16, 58, seed)


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
