"""When the weights are kept as candidates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_twa.config.values import (
    as_epoch,
    check_count,
    check_device,
    check_epoch_or_fraction,
    is_real,
)

__all__ = ["CollectConfig"]


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """When the weights are kept as candidates.

    Args:
        start: First epoch (0-based int) whose weights may be kept, or a fraction of ``max_epochs``
            or, with ``max_steps`` alone, of ``max_steps`` (float in [0, 1)). ``None`` means halfway
            to the phase, and earlier where that would give fewer than two candidates: early weights
            are far from the late ones and mostly make the average worse.
        every_n_epochs: Keep the weights at the end of every epoch ``e`` with
            ``(e + 1) % every_n_epochs == 0``, as ``ModelCheckpoint`` counts.
        every_n_train_steps: Keep them after every so many optimizer steps (``trainer.global_step``,
            which counts those of several optimizers together) instead of at epoch ends.
        max_candidates: Keep only the newest so many candidates. ``None`` keeps all. Running
            averages and files are not counted.
        ema_decays: Decays of exponential moving averages of the weights, updated after every
            optimizer step from ``start`` on, which become further candidates, ``"ema(0.97)"``. Each
            takes a float32 copy of the trainable parameters.
        ema_device: Where they are kept, as in ``torch.device(...)``; ``None`` means with the model.
        checkpoints: Files that hold further candidates: a path, a pattern (``"runs/*/last.ckpt"``),
            the directory of a finished run's candidates or of a checkpoint of Hugging Face's
            libraries (one candidate, in however many files), or a list of these. Lightning
            checkpoints, state dicts (``.pt``, ``.pth``, ``.bin``) and safetensors. Then
            ``start_epoch=0`` makes a soup: nothing is collected, the phase begins at once.

    Raises:
        ValueError: When a value is outside its range, or both intervals are given.
    """

    start: int | float | None = None
    every_n_epochs: int = 1
    every_n_train_steps: int | None = None
    max_candidates: int | None = None
    ema_decays: tuple[float, ...] = ()
    ema_device: str | None = None
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None

    def __post_init__(self) -> None:
        if self.start is not None:
            object.__setattr__(self, "start", as_epoch(self.start))
            check_epoch_or_fraction("CollectConfig.start", self.start)
        check_count("CollectConfig.every_n_epochs", self.every_n_epochs, 1)
        check_count(
            "CollectConfig.every_n_train_steps",
            self.every_n_train_steps,
            1,
            "collect at epoch ends",
        )
        check_count("CollectConfig.max_candidates", self.max_candidates, 2, "keep all")
        if self.every_n_train_steps is not None and self.every_n_epochs != 1:
            raise ValueError(
                f"CollectConfig got every_n_epochs={self.every_n_epochs} and "
                f"every_n_train_steps={self.every_n_train_steps}. Give one of them."
            )
        self._check_averages()

    def _check_averages(self) -> None:
        decays = self.ema_decays
        numbers = isinstance(decays, (tuple, list)) and all(
            is_real(decay) and 0 < decay < 1 for decay in decays
        )
        if not numbers or len(set(decays)) < len(decays):
            raise ValueError(
                f"Invalid CollectConfig.ema_decays={decays!r}. Must be different numbers in "
                f"(0, 1), such as (0.9, 0.99)."
            )
        check_device("CollectConfig.ema_device", self.ema_device, "with the model")
        if self.ema_device is not None and not decays:
            raise ValueError(
                f"CollectConfig.ema_device={self.ema_device!r} needs ema_decays, which are kept "
                f"there."
            )
