"""TWA beside what it has to beat, on scikit-learn's digits; about 8 seconds a seed on one core.

A small CNN with BatchNorm learns from 400 images, for 30 epochs of a schedule of 60: all rows but
the last take as many optimizer steps, those of the phase included, while averages with fixed
weights train on through them. The table goes to stdout, progress to stderr.

    python examples/digits.py              # 5 seeds
    python examples/digits.py --seeds 2
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable

import lightning as L
import torch
import torchmetrics
from digits_table import Row, Score, table, verdict
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_twa import CollectConfig, TWACallback

TRAIN, VAL, BATCH = 400, 80, 50  # the other 1317 images are for testing
NOISE = 0.3  # standard deviation; pixels lie in [0, 1]
EMA_DECAY = 0.97  # per optimizer step

# --- an ordinary LightningDataModule and LightningModule: nothing here knows of TWA


class Digits(L.LightningDataModule):
    """Digits with noise that is drawn once: every epoch sees the same noisy images.

    Args:
        seed: Of the noise and of the split.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
        images += NOISE * torch.randn(images.shape, generator=generator)
        order = torch.randperm(len(images), generator=generator)
        images, labels = images[order], torch.tensor(bunch.target)[order]
        self.train = TensorDataset(images[:TRAIN], labels[:TRAIN])
        self.val = TensorDataset(images[TRAIN : TRAIN + VAL], labels[TRAIN : TRAIN + VAL])
        self.test = TensorDataset(images[TRAIN + VAL :], labels[TRAIN + VAL :])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=BATCH)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=len(self.test))


def augment(images: Tensor, degrees: float = 30.0, pixels: float = 1.0) -> Tensor:
    """Rotate and shift each image at random, at most so far.

    Nearest neighbours keep the noise as strong as in testing; interpolation would smooth it.
    """
    angle, *shift = (2 * torch.rand(3, len(images)) - 1).unbind()
    cos, sin = torch.cos(angle * math.radians(degrees)), torch.sin(angle * math.radians(degrees))
    x, y = (s * 2 * pixels / images.shape[-1] for s in shift)  # the grid is 2 wide
    theta = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


class Classifier(L.LightningModule):
    """A CNN of 16.8k parameters, trained by SGD.

    Args:
        lr_factor: Learning rate at a 0-based optimizer step, as a share of 0.1.
    """

    def __init__(self, lr_factor: Callable[[int], float]) -> None:
        super().__init__()
        self.lr_factor = lr_factor

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.net = nn.Sequential(
            *block(1, 16),
            *block(16, 16),
            nn.MaxPool2d(2),
            *block(16, 32),
            *block(32, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.nll = torchmetrics.MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(augment(images)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.nll(F.cross_entropy(logits, labels), weight=len(labels))
        self.log(f"{stage}/accuracy", self.accuracy, on_epoch=True)
        self.log(f"{stage}/nll", self.nll, on_epoch=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


# --- the rows of the table


class Recorder(L.Callback):
    """Keeps what the averages with fixed weights need, from the first epochs of a run.

    Args:
        epochs: So many.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.snapshots: list[Tensor] = []  # flat parameters after each epoch
        self.last: dict[str, Tensor] = {}  # model state after the last of them, BatchNorm included

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ema = parameters_to_vector(pl_module.parameters()).detach()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        if trainer.current_epoch < self.epochs:
            new = parameters_to_vector(pl_module.parameters()).detach()
            self.ema.lerp_(new, 1 - EMA_DECAY)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < self.epochs:
            self.snapshots.append(parameters_to_vector(pl_module.parameters()).detach())
        if trainer.current_epoch == self.epochs - 1:
            self.last = copy.deepcopy(pl_module.state_dict())


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer that prints nothing and validates once, at its end."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )


def test(model: Classifier, data: Digits) -> Score:
    """Accuracy in percent and NLL on the test images."""
    metrics = trainer(1).test(model, datamodule=data, verbose=False)[0]
    return Score(100 * metrics["test/accuracy"], metrics["test/nll"])


class Comparison:
    """Trains and tests every row for one seed after the other.

    Args:
        full: Epochs of the full schedule.
        epochs: Of every other row.
        phase: Epochs of a phase as in the paper, and of the learning-rate drop.
    """

    def __init__(self, full: int, epochs: int, phase: int) -> None:
        self.full, self.epochs, self.phase = full, epochs, phase
        self.rows: dict[str, Row] = {}
        self.default: TWACallback | None = None  # of the first seed
        self.began = time.monotonic()

    def add_seed(self, seed: int) -> None:
        """All rows; those of the full schedule's first epochs come from one run."""
        data = Digits(seed)
        recorder = Recorder(self.epochs)
        full = self._fit(seed, data, self.full, self._step_schedule, recorder)
        self._add_fixed_weights(seed, data, recorder)

        dropped = self._fit(seed, data, self.epochs, self._drop)
        self._add(seed, "trained", "ordinary LR drop to 0", self.epochs, test(dropped, data))

        default = TWACallback()
        held_out = TWACallback(data="val")
        start = self.epochs - self.phase
        no_averages = CollectConfig(power_averages=(), max_candidates=None)
        as_in_paper = TWACallback(start_epoch=start, heldout=None, collect=no_averages)
        for name, twa in (
            ("TWA (default)", default),
            ('TWA-v (data="val")', held_out),
            (f"TWA-t, {self.phase} epochs, nothing chosen", as_in_paper),
        ):
            model = self._fit(seed, data, self.epochs, self._step_schedule, twa)
            self._add(seed, "twa", name, self.epochs, test(model, data))
            check_paired(model, twa, recorder)
        self.default = self.default or default
        self._add(seed, "trained", "full schedule", self.full, test(full, data))

    def _add_fixed_weights(self, seed: int, data: Digits, recorder: Recorder) -> None:
        model = Classifier(self._step_schedule)
        model.load_state_dict(recorder.last)
        self._add(seed, "trained", "last iterate", self.epochs, test(model, data))
        snapshots = torch.stack(recorder.snapshots)
        for name, average in (
            ("uniform over all epochs (SWA)", snapshots.mean(dim=0)),
            ("uniform over the last half", snapshots[self.epochs // 2 :].mean(dim=0)),
            (f"EMA {EMA_DECAY} per step", recorder.ema),
        ):
            L.seed_everything(seed, verbose=False)
            vector_to_parameters(average, model.parameters())
            update_bn([augment(images) for images, _ in data.train_dataloader()], model)
            self._add(seed, "fixed", name, self.epochs, test(model, data))

    def _fit(
        self,
        seed: int,
        data: Digits,
        epochs: int,
        lr_factor: Callable[[int], float],
        *callbacks: L.Callback,
    ) -> Classifier:
        L.seed_everything(seed, verbose=False)
        model = Classifier(lr_factor)
        trainer(epochs, *callbacks).fit(model, datamodule=data)
        return model

    def _add(self, seed: int, kind: str, name: str, epochs: int, score: Score) -> None:
        self.rows.setdefault(name, Row(kind, epochs, [])).scores.append(score)
        elapsed = time.monotonic() - self.began
        line = f"[{elapsed:5.1f} s] seed {seed}, {name}: {score.accuracy:.2f} % / {score.nll:.3f}"
        print(line, file=sys.stderr, flush=True)

    def _step_schedule(self, step: int) -> float:
        epoch = step // (TRAIN // BATCH)
        return 0.1 ** ((epoch >= self.full // 2) + (epoch >= self.full * 3 // 4))

    def _drop(self, step: int) -> float:
        """Constant, then linearly to zero."""
        epoch = step / (TRAIN // BATCH)
        return min(1.0, max(0.0, (self.epochs - epoch) / self.phase))


def check_paired(model: Classifier, twa: TWACallback, recorder: Recorder) -> None:
    """The learned average, rebuilt by hand: of the *other* run's weights, where they are of epochs,
    since both runs have the same first ones.

    Raises:
        RuntimeError: When the two runs differ.
    """
    assert twa.averaging_weights is not None
    beta = twa.averaging_weights[:, 0]  # one block: the same weights for every tensor
    flat = []
    for candidate in twa.candidates:
        kind, _, epoch = candidate.name.partition("=")
        own = parameters_to_vector(candidate.parameters.values())
        flat.append(recorder.snapshots[int(epoch)] if kind == "epoch" else own)
    rebuilt = beta.float() @ torch.stack(flat)
    off = (rebuilt - parameters_to_vector(model.parameters())).abs().max().item()
    if off > 1e-4:
        raise RuntimeError(f"TWA did not average the recorded weights: off by up to {off:.1e}.")


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description="TWA beside its baselines on noisy digits.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--seed-offset", type=int, default=0, help="the first seed")
    parser.add_argument("--full-epochs", type=int, default=60, help="epochs of the full schedule")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of every other row")
    parser.add_argument("--phase-epochs", type=int, default=5, help="of a phase as in the paper")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}, but must be at least 1")

    torch.set_num_threads(1)  # a model of this size gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # advice on workers and checkpoints, once per fit

    comparison = Comparison(arguments.full_epochs, arguments.epochs, arguments.phase_epochs)
    for seed in range(arguments.seed_offset, arguments.seed_offset + arguments.seeds):
        comparison.add_seed(seed)
    print(f"\n{table(comparison.rows)}\n\n{verdict(comparison.rows)}\n")

    twa = comparison.default
    assert twa is not None
    assert twa.averaging_weights is not None
    print(f"TWA (default), seed {arguments.seed_offset}: {twa.result}")
    beta = twa.averaging_weights[:, 0].tolist()
    weights = ", ".join(f"{n} {b:+.3f}" for n, b in zip(twa.candidate_names, beta, strict=True))
    print(f"Averaging weights of TWA (default), seed {arguments.seed_offset}: {weights}")


if __name__ == "__main__":
    main()
