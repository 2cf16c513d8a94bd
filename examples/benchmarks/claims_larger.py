"""The larger data of the claims benchmark: Fashion-MNIST, and source text that is read once."""

from __future__ import annotations

import functools
import gzip
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from claims_data import (
    CONTEXT,
    Batch,
    Data,
    Loader,
    as_bytes,
    generator_of,
    mislabelled,
    shuffled,
    windows,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
LARGEST = 200_000  # bytes of a source file; what is larger is generated

# --- Fashion-MNIST


def missing(folder: Path) -> list[str]:
    """Names of the files of Fashion-MNIST that a folder lacks."""
    return [name for pair in FILES.values() for name in pair if not (folder / name).is_file()]


@functools.cache
def images(folder: str, part: str) -> Batch:
    """Pixels, uint8, shape (n, 1, 28, 28), and labels."""
    pixels, labels = (
        torch.frombuffer(
            bytearray(gzip.decompress(Path(folder, name).read_bytes())), dtype=torch.uint8
        )
        for name in FILES[part]
    )
    return pixels[16:].view(-1, 1, 28, 28), labels[8:].long()  # after the headers of the format


def mirror(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every second image, at random."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def fashion(
    folder: str,
    seed: int,
    sizes: tuple[int, int],
    wrong: float = 0.0,
    tested: int = 10_000,
    with_validation: bool = False,
) -> Data:
    """Images for training and validation, ``wrong`` of whose labels are drawn at random, and those
    for testing. With ``with_validation`` the images for validation are for training too.
    """
    generator = generator_of(seed, 1005)
    x, y = images(folder, "train")
    chosen = torch.randperm(len(x), generator=generator)[: sum(sizes)]
    x, y = x[chosen].float() / 255, mislabelled(y[chosen], wrong, 10, generator)
    train = len(x) if with_validation else sizes[0]
    pixels, labels = images(folder, "test")
    return Data(
        shuffled(TensorDataset(x[:train], y[:train]), 100, seed, mirror),
        TensorDataset(x[sizes[0] :], y[sizes[0] :]),
        TensorDataset(pixels[:tested].float() / 255, labels[:tested]),
    )


class Residual(nn.Module):
    """Two convolutions with BatchNorm, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images, as the result."""
        return F.relu(self.body(x) + self.shortcut(x))


def residual_net(width: int) -> nn.Sequential:
    """A stem that halves the image, and three residual blocks."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


# --- source text


@functools.cache
def source_files() -> list[Path]:
    """Python's files of the installed packages, in an order of their names."""
    root = Path(sysconfig.get_path("purelib"))
    files = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return [path for _, path in sorted(files) if 0 < path.stat().st_size <= LARGEST]


def stream(seed: int, batch_size: int, steps: int) -> Data:
    """Windows of source text in random order, each of them once; other files for validation (a
    twentieth as much, at least 40,000 bytes) and testing (a tenth). No file is there twice.
    """
    size = CONTEXT + 1
    train = steps * batch_size * size
    wanted = [max(train // 20, 40_000), max(train // 10, 160_000), train]
    files = source_files()
    order = iter(torch.randperm(len(files), generator=generator_of(seed, 1006)).tolist())
    seen: set[bytes] = set()
    parts: list[Tensor] = []
    for count in wanted:
        contents: list[bytes] = []
        length = 0
        while length <= count:
            index = next(order, None)
            if index is None:
                raise ValueError(f"The installed packages have too little text for {steps} steps.")
            content = files[index].read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest not in seen:
                seen.add(digest)
                contents.append(content)
                length += len(content) + 1
        parts.append(as_bytes(contents)[:count])
    val, test, text = parts

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        starts = size * torch.randperm(steps * batch_size, generator=generator)
        yield from (windows(text, batch) for batch in starts.split(batch_size))

    def spaced(part: Tensor, count: int) -> TensorDataset:
        return TensorDataset(*windows(part, torch.linspace(0, len(part) - size, count).long()))

    return Data(Loader(draw, steps, seed), spaced(val, 600), spaced(test, 2400))
