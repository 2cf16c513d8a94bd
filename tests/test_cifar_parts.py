"""The parts of ``examples/cifar.py``, one by one: data, augmentation, models, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.common import load_script

SCRIPT = Path(__file__).parents[1] / "examples" / "cifar.py"


@pytest.fixture(scope="module")
def cifar() -> Any:
    """The example as a module."""
    return load_script(SCRIPT)


def record(labels: list[int]) -> bytes:
    """Pixel values that tell the channel, row and column: 70 c + 2 r + q, so that none is equal."""
    pixels = [70 * c + 2 * r + q // 16 for c in range(3) for r in range(32) for q in range(32)]
    return bytes([*labels, *pixels])


# --- data


@pytest.mark.parametrize(
    ("dataset", "labels", "expected"),
    [("cifar10", [[7], [0]], [7, 0]), ("cifar100", [[19, 99], [3, 42]], [99, 42])],
)
def test_reader_takes_fine_labels_and_planes_row_by_row(
    cifar: Any, tmp_path: Path, dataset: str, labels: list[list[int]], expected: list[int]
) -> None:
    paths = [tmp_path / "one.bin", tmp_path / "two.bin"]
    for path, label in zip(paths, labels, strict=True):
        path.write_bytes(record(label))
    found = cifar.read(paths, cifar.SOURCES[dataset])

    assert found.images.dtype == torch.uint8
    assert found.images.shape == (2, 3, 32, 32)
    assert found.labels.tolist() == expected
    for c, r, q in ((0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 2, 20), (2, 31, 31)):
        assert found.images[:, c, r, q].tolist() == [70 * c + 2 * r + q // 16] * 2


def test_held_out_images_do_not_depend_on_the_seed(cifar: Any) -> None:
    images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    data = cifar.Images(images, torch.arange(20))
    train, val = cifar.hold_out(data, 5)
    torch.manual_seed(99)
    assert cifar.hold_out(data, 5)[1].labels.tolist() == val.labels.tolist()
    assert sorted(train.labels.tolist() + val.labels.tolist()) == list(range(20))
    for part in (train, val):
        assert part.images[:, 0, 0, 0].tolist() == part.labels.tolist()
    everything, nothing = cifar.hold_out(data, 0)
    assert (len(everything), len(nothing)) == (20, 0)


def test_loader_fetches_whole_batches(cifar: Any) -> None:
    data = cifar.Images(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10))
    batches = list(cifar.loader(data, 4, shuffle=True))
    assert [images.shape[0] for images, _ in batches] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(10))


def slow_crop_and_flip(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    """Pixel by pixel: a window of the image in a frame of 4 black pixels, then its mirror image."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for r in range(height):
        for q in range(width):
            y, x = top + r - 4, left + q - 4
            if 0 <= y < height and 0 <= x < width:
                result[:, r, width - 1 - q if flip else q] = image[:, y, x]
    return result


# --- augmentation


def test_crop_and_flip_equals_the_slow_reference(cifar: Any) -> None:
    images = torch.randint(1, 256, (8, 3, 32, 32), dtype=torch.uint8)
    top, left = torch.randint(0, 9, (2, 8))
    top[:3], left[:3] = torch.tensor([0, 8, 4]), torch.tensor([8, 0, 4])
    flip = torch.tensor([True, False] * 4)
    fast = cifar.crop_and_flip(images, top, left, flip)
    assert fast.dtype == torch.uint8
    for i, image in enumerate(images):
        slow = slow_crop_and_flip(image, int(top[i]), int(left[i]), bool(flip[i]))
        assert torch.equal(fast[i], slow)


def test_augment_draws_every_crop_and_flip_alike(cifar: Any) -> None:
    # rows are numbered 1 to 32, columns too: corners tell what was drawn
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    n = 4000
    images = torch.stack([rows, columns, rows]).to(torch.uint8).expand(n, -1, -1, -1)
    augmented = cifar.augment(images).long()
    middle = augmented[:, :, 16, 16]
    flip = augmented[:, 1, 16, 20] < augmented[:, 1, 16, 12]
    top = middle[:, 0] - 17 + 4
    left = torch.where(flip, middle[:, 1] - 16, middle[:, 1] - 17) + 4
    assert torch.equal(cifar.crop_and_flip(images, top, left, flip).long(), augmented)
    for drawn in (top, left):
        shares = torch.bincount(drawn, minlength=9) / n
        assert len(shares) == 9
        assert shares.sub(1 / 9).abs().max() < 0.03
    assert flip.float().mean().sub(0.5).abs() < 0.05


class Seen(nn.Module):
    """Keeps what a network is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return x.flatten(1)[:, :10]


def test_only_training_augments_and_everything_normalizes(
    cifar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cifar.SOURCES["cifar10"]
    recipe = cifar.RECIPES["vgg16"]._replace(build=lambda classes, width: Seen())
    model = cifar.Classifier(recipe, source, 4)
    monkeypatch.setattr(model, "log", lambda *args, **options: None)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = (images, torch.arange(6))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.mean, source.std))

    for step in (model.validation_step, model.test_step):
        step(batch, 0)
        torch.testing.assert_close(model.net.x, (images / 255 - mean) / std)
    torch.manual_seed(5)
    expected = cifar.augment(images)
    assert not torch.equal(expected, images)
    torch.manual_seed(5)
    model.training_step(batch, 0)
    torch.testing.assert_close(model.net.x, (expected / 255 - mean) / std)


def parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


# --- models


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        # Convolutions of 9 i o weights: 9 * 1,634,496; 4,224 biases; twice as many of BatchNorm;
        # two layers of 512 * 513; and 513 a class.
        ("vgg16", 10, 14_710_464 + 4_224 + 8_448 + 525_312 + 5_130),
        ("vgg16", 100, 15_248_448 + 513 * 100),
        # A block of p planes on i channels: 2 i + i p + 13 p^2 + 4 p, and 4 p i for a shortcut.
        # The first layer; 3 stages of a first block, its shortcut and 17 more; BatchNorm; classes.
        (
            "preresnet164",
            10,
            432
            + (3_680 + 1_024 + 17 * 4_544)
            + (15_616 + 8_192 + 17 * 17_792)
            + (61_952 + 32_768 + 17 * 70_400)
            + 512
            + 2_570,
        ),
        ("preresnet164", 100, 1_700_688 + 257 * 100),
        # Patches, token, 65 positions; 6 layers: attention 4 * 512 * 513, an MLP of 2048, two
        # LayerNorms; the last LayerNorm; classes.
        (
            "vit",
            10,
            25_088
            + 512
            + 65 * 512
            + 6 * (4 * 512 * 513 + 2 * 512 * 2048 + 2048 + 512 + 2 * 1024)
            + 1_024
            + 5_130,
        ),
    ],
)
def test_full_size_models_have_the_known_numbers_of_parameters(
    cifar: Any, name: str, classes: int, expected: int
) -> None:
    with torch.device("meta"):
        net = cifar.RECIPES[name].build(classes, 1.0)
    assert parameters(net) == expected
    known = {("vgg16", 10): 15_253_578, ("preresnet164", 10): 1_703_258}
    assert expected == known.get((name, classes), expected)


def test_preresnet164_has_164_layers(cifar: Any) -> None:
    with torch.device("meta"):
        net = cifar.preresnet164(10)
    weighted = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shortcuts = [m for m in net.modules() if isinstance(getattr(m, "shortcut", None), nn.Conv2d)]
    assert len(weighted) - len(shortcuts) == 164


@pytest.mark.parametrize("name", ["vgg16", "preresnet164", "vit"])
def test_narrow_models_take_images_and_learn_everywhere(cifar: Any, name: str) -> None:
    net = cifar.RECIPES[name].build(10, 0.0625)
    logits = net(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# --- schedules


def test_learning_rates_follow_the_schedule_of_all_epochs(cifar: Any) -> None:
    sgd = [cifar.steps(epoch, 200) for epoch in (0, 99, 100, 149, 150, 199)]
    assert sgd == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    adamw = [cifar.cosine(epoch, 200) for epoch in (0, 9, 10, 105, 200)]
    assert adamw == pytest.approx([0.1, 1, 1, 0.5, 0])
    for name, kind in (("vgg16", torch.optim.SGD), ("vit", torch.optim.AdamW)):
        model = cifar.Classifier(cifar.RECIPES[name], cifar.SOURCES["cifar10"], 8, 0.0625)
        configured = model.configure_optimizers()
        optimizer = configured["optimizer"]
        assert isinstance(optimizer, kind)
        peak = 0.1 if name == "vgg16" else 1e-3
        assert optimizer.defaults["weight_decay"] == (5e-4 if name == "vgg16" else 0.05)
        for epoch in range(8):
            factor = cifar.RECIPES[name].factor(epoch, 8)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(peak * factor)
            optimizer.step()
            configured["lr_scheduler"].step()
