"""TWA on CIFAR-10 and CIFAR-100, for those who have the data and a GPU.

The project has neither the data nor a GPU at hand: only tiny made-up files in the same format have
been run, none of the commands below. So there are no figures here; make your own.

Get the *binary version* from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it. Rows of the
paper (Li et al., arXiv 2205.13104v4): 200 epochs beside 100 + 10 of the same schedule, 45 % fewer.
Likewise with ``--dataset cifar100``:

    python examples/cifar.py --data DIR --model vgg16 --mode full
    python examples/cifar.py --data DIR --model vgg16 --mode twa --collect-start 0
    python examples/cifar.py --data DIR --model preresnet164 --mode full
    python examples/cifar.py --data DIR --model preresnet164 --mode twa --collect-start 0
    python examples/cifar.py --data DIR --model vit --mode full
    python examples/cifar.py --data DIR --model vit --mode twa --collect-start 0

The paper averages all 100 epochs, hence ``--collect-start 0``; the package's default is the second
half. Solver and basis are the package's. For TWA on held-out data (``--data-for-coefficients val``)
give the full run the same ``--validation-images``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lightning_twa import CollectConfig, SubspaceConfig, TWACallback

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SHAPE, PIXELS = (3, 32, 32), 3 * 32 * 32
PADDING = 4  # pixels, on each side, before a random crop
EVALUATION_BATCH = 500


class Source(NamedTuple):
    """How a data set is stored, and the channels' statistics over its training images."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int  # before the pixels of a record; the last of them is the label
    classes: int
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]


BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
MEAN_10, STD_10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MEAN_100, STD_100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
TEN = Source("cifar-10-batches-bin", BATCHES, ("test_batch.bin",), 1, 10, MEAN_10, STD_10)
HUNDRED = Source("cifar-100-binary", ("train.bin",), ("test.bin",), 2, 100, MEAN_100, STD_100)
SOURCES = {"cifar10": TEN, "cifar100": HUNDRED}


class Images(Dataset):
    """Images ``(N, 3, 32, 32)`` uint8 and labels ``(N,)`` int64, fetched a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices, dtype=torch.int64)  # there may be none
        return self.images[chosen], self.labels[chosen]


def read(paths: Iterable[Path], source: Source) -> Images:
    """All records of binary files; a ValueError where they are not."""
    record = source.label_bytes + PIXELS
    images, labels = [], []
    for path in paths:
        content = bytearray(path.read_bytes() if path.is_file() else b"")
        problem = f"has {len(content)} bytes, not whole records of {record}"
        if not path.is_file():
            problem = "is missing"
        elif content and len(content) % record == 0:
            records = torch.frombuffer(content, dtype=torch.uint8).view(-1, record)
            images.append(records[:, source.label_bytes :].reshape(-1, *SHAPE))
            labels.append(records[:, source.label_bytes - 1].long())
            largest = int(labels[-1].max())
            problem = f"has the label {largest}" if largest >= source.classes else ""
        if problem:
            raise ValueError(
                f"{path} {problem}. Get the binary version from {PAGE}, unpack it, and give its "
                f"folder ({source.folder}) or the one that contains it."
            )
    return Images(torch.cat(images), torch.cat(labels))


def load(data: Path, source: Source) -> tuple[Images, Images]:
    """Training and test images from the data set's folder or the one that contains it."""
    folder = data / source.folder if (data / source.folder).is_dir() else data
    train, test = ([folder / name for name in names] for names in (source.train, source.test))
    return read(train, source), read(test, source)


def hold_out(data: Images, count: int) -> tuple[Images, Images]:
    """The other images, and ``count`` that are drawn alike whatever the seed of the run."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Images(*data.__getitems__(order[count:])), Images(*data.__getitems__(order[:count]))


def loader(data: Images, batch_size: int, shuffle: bool = False) -> DataLoader:
    """Batches; nothing is left to collate, and under DDP the Trainer puts its own sampler in."""
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=tuple)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Each image's own crop of its zero-padded self, mirrored left to right where ``flip`` is true.

    Images are ``(N, C, H, W)``; ``top`` and ``left``, ``(N,)`` int64 from 0 to ``2 * PADDING``,
    are the crops' first rows and columns in the padded images.
    """
    n, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [PADDING] * 4)
    y = top[:, None] + torch.arange(height, device=device)
    x = left[:, None] + torch.arange(width, device=device)
    x = torch.where(flip[:, None], x.flip(1), x)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, y[:, None, :, None], x[:, None, None, :]]


def augment(images: Tensor) -> Tensor:
    """A random crop of the padded image, mirrored every other time."""
    n, device = len(images), images.device
    top, left = torch.randint(2 * PADDING + 1, (2, n), device=device).unbind()
    return crop_and_flip(images, top, left, torch.rand(n, device=device) < 0.5)


def scaled(channels: int, width: float) -> int:
    """A share of the channels, at least one."""
    return max(1, round(channels * width))


def initialize(net: nn.Module) -> nn.Module:
    """He's initialization of the convolutions, by outputs."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


def vgg16(classes: int, width: float = 1.0) -> nn.Module:
    """VGG16 with BatchNorm for 32 x 32 pixels, with a classifier 512 wide."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        outputs = scaled(channels, width)
        for _ in range(repeats):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(inputs, inputs), nn.ReLU(inplace=True)]
    return initialize(nn.Sequential(*layers, nn.Linear(inputs, classes)))


class Bottleneck(nn.Module):
    """Pre-activation bottleneck: ``planes`` channels inside, four times as many outside."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = (planes, planes, 3, stride)
        for i, o, kernel, step in (inputs, planes, 1, 1), inner, (planes, 4 * planes, 1, 1):
            convolution = nn.Conv2d(i, o, kernel, step, padding=kernel // 2, bias=False)
            layers += [nn.BatchNorm2d(i), nn.ReLU(inplace=True), convolution]
        self.residual = nn.Sequential(*layers)
        shortcut = nn.Conv2d(inputs, 4 * planes, 1, stride=stride, bias=False)
        self.shortcut = nn.Identity() if stride == 1 and inputs == 4 * planes else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


def preresnet164(classes: int, width: float = 1.0, blocks: int = 18) -> nn.Module:
    """PreResNet of three stages with so many bottlenecks each: ``9 * blocks + 2`` layers."""
    inputs = scaled(16, width)
    layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, padding=1, bias=False)]
    for stage, channels in enumerate((16, 32, 64)):
        planes = scaled(channels, width)
        for block in range(blocks):
            layers.append(Bottleneck(inputs, planes, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * planes
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return initialize(nn.Sequential(*layers, nn.Linear(inputs, classes)))


class ViT(nn.Module):
    """A pre-norm Vision Transformer with a class token, learned positions and 8 heads."""

    def __init__(self, classes: int, width: float = 1.0, depth: int = 6, patch: int = 4) -> None:
        super().__init__()
        dim = 8 * scaled(64, width)
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (32 // patch) ** 2, dim))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(dim, 8, 4 * dim, **options) for _ in range(depth)]
        # nn.TransformerEncoder would begin with equal weights in all layers
        self.layers = nn.Sequential(nn.Dropout(0.1), *layers)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.layers(x + self.positions)[:, 0])


def steps(epoch: int, epochs: int) -> float:
    """A tenth of the learning rate from 50 % of the schedule on, a hundredth from 75 %."""
    return 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


def cosine(epoch: int, epochs: int) -> float:
    """Linear warm-up over 5 % of the schedule, then a cosine to zero."""
    warmup = epochs // 20
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


class Recipe(NamedTuple):
    """A model, its optimizer, and the learning rate's factor at an epoch of a schedule."""

    build: Callable[[int, float], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    factor: Callable[[int, int], float]


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
RECIPES = {
    "vgg16": Recipe(vgg16, SGD, steps),
    "preresnet164": Recipe(preresnet164, SGD, steps),
    "vit": Recipe(ViT, ADAMW, cosine),
}


class Classifier(L.LightningModule):
    """An ordinary LightningModule; a run need not reach the end of its schedule of ``epochs``."""

    def __init__(self, recipe: Recipe, source: Source, epochs: int, width: float = 1.0) -> None:
        super().__init__()
        self.recipe, self.epochs = recipe, epochs
        self.net = recipe.build(source.classes, width)
        for name in ("mean", "std"):
            value = torch.tensor(getattr(source, name)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=source.classes)
        self.nll = torchmetrics.MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images / 255 - self.mean) / self.std)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(augment(images)), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.nll(F.cross_entropy(logits, batch[1]), weight=len(logits))
        self.log(f"{stage}/accuracy", self.accuracy, on_epoch=True, prog_bar=True)
        self.log(f"{stage}/nll", self.nll, on_epoch=True)

    def configure_optimizers(self) -> dict:
        optimizer = self.recipe.optimizer(self.parameters())
        scheduler = LambdaLR(optimizer, lambda epoch: self.recipe.factor(epoch, self.epochs))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def count(text: str) -> int:
    """A positive number."""
    if int(text) < 1:
        raise ValueError  # which argparse reports
    return int(text)


def blocks(text: str) -> str | int:
    """What ``SubspaceConfig.blocks`` takes."""
    return text if text in ("global", "tensor") else count(text)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Images, Images]:
    """Options, training and test images; whatever is wrong with them ends the program."""
    parser = argparse.ArgumentParser(description="TWA or full training on CIFAR.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the binary version")
    add("--dataset", choices=SOURCES, default="cifar10")
    add("--model", choices=RECIPES, default="vgg16")
    add("--width", type=float, default=1.0, help="share of the model's channels")
    add("--mode", choices=("full", "twa"), default="twa", help="the baseline, or TWA")
    add("--epochs", type=count, default=200, help="length of the learning-rate schedule")
    add("--batch-size", type=count, default=128, help="of each device")
    add("--validation-images", type=int, help="held out; 5000 for --data-for-coefficients val")
    add("--seed", type=int, default=0)
    add("--devices", type=count, default=1)
    add("--precision", choices=("32-true", "16-mixed", "bf16-mixed"), default="32-true")
    twa = parser.add_argument_group("with --mode twa")
    twa.add_argument("--twa-start", type=count, help="epochs before TWA; half of --epochs")
    twa.add_argument("--twa-epochs", type=count, help="epochs of TWA; 10")
    twa.add_argument("--collect-start", type=int, help="first epoch that is averaged")
    twa.add_argument("--bits", type=int, choices=(*range(1, 9), 16, 32), help="of the subspace")
    twa.add_argument("--blocks", type=blocks, help="global, tensor, or elements per block")
    twa.add_argument("--data-for-coefficients", choices=("train", "val"), help="train")
    options = parser.parse_args(argv)
    only = ["twa_start", "twa_epochs", "collect_start", "bits", "blocks", "data_for_coefficients"]
    given = [name for name in only if getattr(options, name) is not None]
    if options.mode == "full" and given:
        parser.error(f"--{given[0].replace('_', '-')} needs --mode twa")
    start = options.twa_start = options.twa_start or options.epochs // 2
    if options.mode == "twa" and not 2 <= start <= options.epochs:
        parser.error(f"--twa-start {start} is not in 2..{options.epochs} (--epochs)")
    if not 0 < options.width < math.inf:
        parser.error(f"--width {options.width} is not a number above 0")
    try:
        train, test = load(options.data, SOURCES[options.dataset])
    except ValueError as error:
        parser.error(str(error))
    held_out = options.data_for_coefficients == "val"
    if options.validation_images is None:
        options.validation_images = 5000 if held_out else 0
    if not held_out <= options.validation_images < len(train):
        parser.error(f"--validation-images must be in {int(held_out)}..{len(train) - 1}")
    return options, train, test


def main(argv: Sequence[str] | None = None) -> None:
    """Train and test as the options say."""
    options, train, test = parse(argv)
    L.seed_everything(options.seed, verbose=False)
    train, val = hold_out(train, options.validation_images)
    model = Classifier(
        RECIPES[options.model], SOURCES[options.dataset], options.epochs, options.width
    )
    callbacks, epochs = [], options.epochs
    if options.mode == "twa":
        epochs = options.twa_start + (options.twa_epochs or 10)
        twa = TWACallback(
            start_epoch=options.twa_start,
            data=options.data_for_coefficients or "train",
            collect=CollectConfig(start=options.collect_start),
            subspace=SubspaceConfig(bits=options.bits or 32, blocks=options.blocks or "global"),
        )
        callbacks.append(twa)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        devices=options.devices,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
    )
    train_loader = loader(train, options.batch_size, shuffle=True)
    began = time.monotonic()
    trainer.fit(model, train_loader, loader(val, EVALUATION_BATCH) if len(val) else None)
    seconds = time.monotonic() - began
    metrics = trainer.test(model, loader(test, EVALUATION_BATCH), verbose=False)[0]
    trainer.print(
        f"{options.model} on {options.dataset}, {options.mode}, seed {options.seed}: test accuracy "
        f"{100 * metrics['test/accuracy']:.2f} %, NLL {metrics['test/nll']:.4f}, "
        f"{trainer.current_epoch} epochs, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
