"""The data of the claims benchmark that ships with scikit-learn and Python.

Batches depend on (seed, epoch) only; a run that stops early is the first part of the full one.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
CONTEXT = 64  # bytes of a window of text


def generator_of(seed: int, number: int) -> torch.Generator:
    """Numbers of its own for each pair of small integers."""
    return torch.Generator().manual_seed(1009 * seed + number)


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


def mislabelled(y: Tensor, wrong: float, classes: int, generator: torch.Generator) -> Tensor:
    """Labels of which the share ``wrong`` is drawn at random, the right one among them."""
    replaced = torch.rand(len(y), generator=generator) < wrong
    return torch.where(replaced, torch.randint(classes, (len(y),), generator=generator), y)


def digits(
    seed: int,
    sizes: tuple[int, int],
    batch_size: int,
    noise: float,
    augment: Augment = unchanged,
    wrong: float = 0.0,
    clean_validation: bool = False,
    classes: Sequence[int] = range(10),
) -> Data:
    """Digits of consecutive classes, which are labelled from 0; what is left over is for testing.

    ``sizes`` are images for training and validation, ``wrong`` is the share of their labels drawn
    at random; those for testing are right. Pixels from 0 to 1 get noise once, but ``add_noise``
    gets clean ones.
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
    noisy = train if clean_validation else sum(sizes)
    y[:noisy] = mislabelled(y[:noisy], wrong, len(classes), generator)
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
