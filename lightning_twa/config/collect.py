"""When the weights are kept as candidates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_twa.config.patterns import check_patterns, is_selected
from lightning_twa.config.reading import as_names, read_fields
from lightning_twa.config.values import (
    as_epoch,
    check_choice,
    check_count,
    check_device,
    check_epoch_or_fraction,
    is_real,
)

__all__ = ["CollectConfig"]

WIDEST = 0.28  # sigma_rel of the uniform average of all steps is 1 / sqrt(12) = .2887


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
            ``None``, without ``every_n_train_steps``: keep none, and leave the averages alone.
        every_n_train_steps: Keep them after every so many optimizer steps (``trainer.global_step``,
            which counts those of several optimizers together) instead of at epoch ends.
        max_candidates: Keep at most so many of them; ``None`` keeps all. Running averages and files
            are not counted. ``"auto"``: sixteen, spread evenly, and all with
            ``SolverConfig(name="uniform")``.
        keep: Which are kept of more than ``max_candidates``: the ``"newest"``, or those that are
            spread most ``"evenly"``.
        power_averages: Averages over all optimizer steps before the phase, of each cycle, as
            further candidates, ``"power(0.056)"``: the weight of step ``s`` is proportional to
            ``s ** gamma``, so that the memory is a share of the run, whatever its length (Karras et
            al., arXiv 2312.02696, section 3.1). The numbers are ``sigma_rel``, the width of that
            memory, in (0, 0.28]. With them come the uniform average of all steps, ``"mean"``, and
            the last weights, ``"step=..."``, or ``"last(step=...)"`` beside means. They take a
            float32 copy of the trainable parameters on their device, one more of each average in
            main memory and in checkpoints, and one addition a step. Not with
            ``SolverConfig(name="uniform")``, nor in a soup. ``()``: none of these.
        ema_decays: Decays of exponential moving averages of the weights, updated after every
            optimizer step from ``start`` on, which become further candidates, ``"ema(0.97)"``. Each
            takes a float32 copy of the trainable parameters.
        ema_device: Where they are kept, as in ``torch.device(...)``; ``None`` means with the model.
        checkpoints: Files that hold further candidates: a path, a pattern (``"runs/*/last.ckpt"``),
            the directory of a finished run's candidates or of a checkpoint of Hugging Face's
            libraries (one candidate, in however many files), or a list of these. Lightning
            checkpoints, state dicts (``.pt``, ``.pth``, ``.bin``) and safetensors. Then
            ``start_epoch=0`` makes a soup: nothing is collected, the phase begins at once.
        include: Patterns of names of parameters, one or a list: only those that match are averaged,
            the others keep the weights that ordinary training ended with (of a soup those of its
            newest file). ``"encoder"`` is all within that module, ``"*.bias"`` every bias;
            ``None``: all. Buffers go by the same patterns, but BatchNorm statistics are computed
            for the result whatever these say.
        exclude: Patterns of those that are not, also where ``include`` matches.
        dense: Keep means instead of weights: over the optimizer steps since the candidate before
            (or since collecting began), all of an epoch for instance, so that every step of the
            window counts, as in SWAD (Cha et al., arXiv 2102.08604). Takes a float32 copy of the
            trainable parameters, where ``ema_device`` says. Buffers are those at the time.

    Raises:
        ValueError: When a value is outside its range, or both intervals are given.
    """

    start: int | float | None = None
    every_n_epochs: int | None = 1
    every_n_train_steps: int | None = None
    max_candidates: int | Literal["auto"] | None = "auto"
    keep: Literal["newest", "evenly"] = "newest"
    power_averages: tuple[float, ...] = (0.02, 0.056, 0.13, 0.23)
    ema_decays: tuple[float, ...] = ()
    ema_device: str | None = None
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] = ()
    dense: bool = False

    def __post_init__(self) -> None:
        read_fields(self)
        object.__setattr__(self, "start", as_epoch(self.start))
        check_epoch_or_fraction("CollectConfig.start", self.start, "halfway to the phase")
        check_count("CollectConfig.every_n_epochs", self.every_n_epochs, 1, "keep none")
        check_count(
            "CollectConfig.every_n_train_steps",
            self.every_n_train_steps,
            1,
            "collect at epoch ends",
        )
        check_count(
            "CollectConfig.max_candidates", self.max_candidates, 2, "keep all", words=("auto",)
        )
        check_choice("CollectConfig.keep", self.keep, ("newest", "evenly"))
        if self.every_n_train_steps is not None and self.every_n_epochs not in (1, None):
            raise ValueError(
                f"CollectConfig got every_n_epochs={self.every_n_epochs} and "
                f"every_n_train_steps={self.every_n_train_steps}. Give one of them."
            )
        self._check_averages()
        if not isinstance(self.dense, bool):
            raise ValueError(f"Invalid CollectConfig.dense={self.dense!r}. Must be True or False.")
        if self.dense and not self.takes_snapshots:
            raise ValueError(
                "CollectConfig(dense=True) keeps means between candidates, but every_n_epochs=None "
                "keeps none. Give every_n_epochs or every_n_train_steps."
            )
        object.__setattr__(self, "include", as_names(self.include))
        object.__setattr__(self, "exclude", as_names(self.exclude))
        check_patterns("CollectConfig.include", self.include, "all")
        check_patterns("CollectConfig.exclude", self.exclude)
        if not (self.takes_snapshots or self.power_averages or self.checkpoints):
            raise ValueError(
                f"CollectConfig(every_n_epochs=None) keeps no weights, and power_averages="
                f"{self.power_averages!r} no averages of all steps. Give every_n_epochs, "
                f"every_n_train_steps or power_averages."
            )

    @property
    def selects(self) -> bool:
        """Whether some parameters may not be averaged."""
        return self.include is not None or bool(self.exclude)

    def averages(self, names: Iterable[str]) -> bool:
        """Whether a tensor that has these names is averaged."""
        include, exclude = as_names(self.include), as_names(self.exclude)
        return is_selected(names, include, exclude)

    @property
    def takes_snapshots(self) -> bool:
        """Whether the weights are kept at epoch ends or after steps."""
        return self.every_n_epochs is not None or self.every_n_train_steps is not None

    def _check_averages(self) -> None:
        decays, widths = self.ema_decays, self.power_averages
        fine = isinstance(widths, (tuple, list)) and all(
            is_real(width) and 0 < width <= WIDEST for width in widths
        )
        if not fine or len(set(widths)) < len(widths):
            raise ValueError(
                f"Invalid CollectConfig.power_averages={widths!r}. Must be different numbers in "
                f"(0, {WIDEST}], such as (0.056, 0.13), or () (none)."
            )
        object.__setattr__(self, "power_averages", tuple(widths))
        numbers = isinstance(decays, (tuple, list)) and all(
            is_real(decay) and 0 < decay < 1 for decay in decays
        )
        if not numbers or len(set(decays)) < len(decays):
            raise ValueError(
                f"Invalid CollectConfig.ema_decays={decays!r}. Must be different numbers in "
                f"(0, 1), such as (0.9, 0.99), or () (none)."
            )
        check_device("CollectConfig.ema_device", self.ema_device, "with the model")
        if self.ema_device is not None and not (decays or self.dense):
            raise ValueError(
                f"CollectConfig.ema_device={self.ema_device!r} needs ema_decays or dense=True, "
                f"which are kept there."
            )
