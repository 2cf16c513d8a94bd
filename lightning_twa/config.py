"""What a user can set, as frozen keyword-only dataclasses that are checked when they are made."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

__all__ = ["CollectConfig", "SolverConfig", "StorageConfig", "SubspaceConfig"]

BASES = ("pca", "candidates", "orthonormal")
SOLVERS = ("full_matrix_adam", "adamw", "sgd", "uniform")
PARAMETRIZATIONS = ("free", "simplex", "mask")
STORAGES = ("auto", "memory", "disk")
DISTRIBUTE = ("auto", "replicate", "shard")
SCHEDULES = ("cosine", "linear", "step", "constant")
DATA = {  # what the coefficients can be trained on, in words
    "train": "the training data",
    "val": "the validation data",
    "twa": "the data of twa_dataloader()",
}


def is_int(value: object) -> bool:
    """True for an integer that is not a bool (``True`` is an ``int`` in Python)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for a finite int or float that is not a bool."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def as_epoch(value: Any) -> Any:
    """4 of 4.0, which jsonargparse may make of 4: to its caches int | float is float | int."""
    whole = isinstance(value, float) and value >= 1.0 and value.is_integer()
    return int(value) if whole else value


def check_epoch_or_fraction(name: str, value: object) -> None:
    """An epoch (int >= 0) or a fraction of ``max_epochs`` (float in [0, 1))."""
    if is_int(value) and value >= 0:  # type: ignore[operator]
        return
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return
    raise ValueError(
        f"Invalid {name}={value!r}. Must be an epoch (int >= 0) "
        f"or a fraction of max_epochs (float in [0, 1))."
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, choices))}."
        )


def _check_count(name: str, value: object, minimum: int, none_means: str | None = None) -> None:
    if none_means is not None and value is None:
        return
    if not (is_int(value) and value >= minimum):  # type: ignore[operator]
        alternative = f", or None ({none_means})" if none_means is not None else ""
        raise ValueError(f"Invalid {name}={value!r}. Must be an int >= {minimum}{alternative}.")


def _check_device(name: str, value: object, none_means: str) -> None:
    if value is None:
        return
    try:
        torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"Invalid {name}={value!r}. Must be a name that torch.device takes ('cpu', 'cuda', "
            f"'cuda:1', ...), or None ({none_means})."
        ) from None


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """When the weights are kept as candidates.

    Args:
        start: First epoch (0-based int) whose weights may be kept, or a fraction of ``max_epochs``
            (float in [0, 1)). ``None`` means halfway to ``start_epoch``, and earlier where that
            would give fewer than two candidates: early weights are far from the late ones and
            mostly make the average worse.
        every_n_epochs: Keep the weights at the end of every epoch ``e`` with
            ``(e + 1) % every_n_epochs == 0``, as ``ModelCheckpoint`` counts.
        every_n_train_steps: Keep them after every so many optimizer steps instead of at epoch ends.
        max_candidates: Keep only the newest so many candidates. ``None`` keeps all. Running
            averages and files are not counted.
        ema_decays: Decays of exponential moving averages of the weights, updated after every
            optimizer step from ``start`` on, which become further candidates, ``"ema(0.97)"``. Each
            takes a float32 copy of the trainable parameters.
        ema_device: Where they are kept, as in ``torch.device(...)``; ``None`` means with the model.
        checkpoints: Files that hold further candidates: a path, a pattern (``"runs/*/last.ckpt"``),
            the directory of a finished run's candidates, or a list of these. Lightning
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
        _check_count("CollectConfig.every_n_epochs", self.every_n_epochs, 1)
        _check_count(
            "CollectConfig.every_n_train_steps",
            self.every_n_train_steps,
            1,
            "collect at epoch ends",
        )
        _check_count("CollectConfig.max_candidates", self.max_candidates, 2, "keep all")
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
        _check_device("CollectConfig.ema_device", self.ema_device, "with the model")
        if self.ema_device is not None and not decays:
            raise ValueError(
                f"CollectConfig.ema_device={self.ema_device!r} needs ema_decays, which are kept "
                f"there."
            )


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """Which subspace the candidates span and how its coefficients are grouped.

    Args:
        basis: ``"pca"``: principal directions of the centered candidates, each scaled so that one
            unit of its coefficient is one standard deviation of the candidates along it.
            ``"candidates"``: the centered candidates scaled to unit norm (arXiv 2205.13104v4).
            ``"orthonormal"``: Gram-Schmidt of the uncentered candidates (the ICLR 2023 version).
        blocks: ``"global"``: one coefficient per direction for the whole model. ``"tensor"``: one
            per direction and parameter tensor. An int: consecutive tensors are grouped until a
            group holds at least so many elements.
        parametrization: ``"free"``: any averaging weights in the span. ``"simplex"``: a softmax, so
            that none is negative (learned soup). ``"mask"``: a uniform average of ``mask_size``
            candidates, which are learned (SeWA, arXiv 2502.10119). The last two need a basis with
            a center.
        mask_size: Candidates that a mask keeps; ``None`` means half of them, rounded up.
        bits: How an entry of a direction is kept: 1 to 8 bits, really packed, with one bfloat16
            scale per 128 entries; 16, bfloat16; 32, full precision. The center is always exact.
        rank: Keep only the so many largest principal directions (``basis="pca"`` only).
        group_size: With more candidates than this, they are optimized in groups of at most so many,
            one group after another, each for its share of the steps and from the weights that the
            group before it arrived at; the phase ends with the mean of what the groups arrived at.
            Memory for directions is that of a group. ``None``: all at once.
        device: Where center and directions are kept, as in ``torch.device(...)``; ``None`` means
            with the model. ``"cpu"`` keeps them off an accelerator, for slower steps.

    Raises:
        ValueError: When a value is outside its range or ``rank`` goes with another basis.
    """

    basis: Literal["pca", "candidates", "orthonormal"] = "pca"
    blocks: Literal["global", "tensor"] | int = "global"
    parametrization: Literal["free", "simplex", "mask"] = "free"
    mask_size: int | None = None
    bits: int = 32
    rank: int | None = None
    group_size: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_choice("SubspaceConfig.basis", self.basis, BASES)
        self._check_parametrization()
        if self.blocks not in ("global", "tensor") and not (
            is_int(self.blocks) and self.blocks >= 1  # type: ignore[operator]
        ):
            raise ValueError(
                f"Invalid SubspaceConfig.blocks={self.blocks!r}. Must be 'global', 'tensor', or an "
                f"int >= 1, the minimum number of elements per block."
            )
        if not is_int(self.bits) or self.bits not in (*range(1, 9), 16, 32):
            raise ValueError(
                f"Invalid SubspaceConfig.bits={self.bits!r}. Must be 1 to 8, 16 or 32."
            )
        _check_device("SubspaceConfig.device", self.device, "with the model")
        _check_count("SubspaceConfig.rank", self.rank, 1, "keep all directions")
        _check_count("SubspaceConfig.group_size", self.group_size, 2, "all at once")
        if self.rank is not None and self.basis != "pca":
            raise ValueError(
                f"SubspaceConfig.rank={self.rank} needs basis='pca', where directions are ordered "
                f"by "
                f"variance, but basis={self.basis!r}. Use CollectConfig.max_candidates to have "
                f"fewer."
            )

    def _check_parametrization(self) -> None:
        name = self.parametrization
        check_choice("SubspaceConfig.parametrization", name, PARAMETRIZATIONS)
        _check_count("SubspaceConfig.mask_size", self.mask_size, 1, "half of the candidates")
        if self.mask_size is not None and name != "mask":
            raise ValueError(
                f"SubspaceConfig.mask_size={self.mask_size} needs parametrization='mask', but "
                f"parametrization={name!r}."
            )
        if name == "free":
            return
        if self.basis == "orthonormal":
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} needs a basis with a center ('pca' or "
                f"'candidates'), but basis='orthonormal'."
            )
        if self.group_size is not None:
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} does not go with "
                f"group_size={self.group_size}: a group starts from weights that are no average of "
                f"its own candidates. Use parametrization='free', or no group_size."
            )
        if self.rank is not None:
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} needs all directions, but "
                f"rank={self.rank} drops some. Use CollectConfig.max_candidates to have fewer."
            )


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How the coefficients are trained.

    Args:
        name: ``"full_matrix_adam"``, ``"adamw"`` or ``"sgd"``. Or ``"uniform"``, which trains
            nothing: ordinary training goes on to the end of the run, the weights from
            ``CollectConfig.start`` (``None``: from ``start_epoch``) on are candidates, and the run
            ends with their uniform average: SWA, or, with ``max_candidates``, LAWA.
        radius: Step budget: the length of the path of each block's coefficients over the whole
            phase is at most this, in standard deviations of the candidates (``basis="pca"``), so
            the learning rate is ``radius / sum(schedule factors)``. ``None`` means 2, and in a soup
            (``start_epoch=0``) ``2 sqrt(n)``: among runs that are no steps of one way the best may
            be a single one, and those lie ``sqrt(n - 1)`` from their mean. Not used when ``lr`` is
            given.
        lr: Peak learning rate of the coefficients, instead of ``radius``. Required for ``"sgd"``
            and for every basis but ``"pca"``, where steps have no common unit.
        schedule: ``"cosine"`` to zero, ``"linear"`` to zero, ``"step"`` (a tenth at 50 % and again
            at 75 % of the phase), or ``"constant"``.
        warmup: Fraction of the phase's optimizer steps over which the learning rate rises linearly.
        weight_decay: Pull of the coefficients towards the uniform average; decoupled from the
            gradient for the Adam solvers, added to it for ``"sgd"``, as in ``torch.optim``.
        momentum: Momentum of ``"sgd"``.
        betas: Decay rates of the first and second moment of the Adam solvers.
        sam_rho: Radius of sharpness-aware minimization (Foret et al., arXiv 2010.01412) on the
            coefficients: the gradient is taken so far up the slope, which doubles the cost of a
            step. 0 turns it off.

    Raises:
        ValueError: When a value is outside its range, or given to a solver that does not use it.
    """

    name: Literal["full_matrix_adam", "adamw", "sgd", "uniform"] = "full_matrix_adam"
    radius: float | None = None
    lr: float | None = None
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup: float = 0.2
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    sam_rho: float = 0.0

    def __post_init__(self) -> None:
        check_choice("SolverConfig.name", self.name, SOLVERS)
        check_choice("SolverConfig.schedule", self.schedule, SCHEDULES)
        for field in ("radius", "lr"):
            value = getattr(self, field)
            if value is not None and not (is_real(value) and value > 0):
                raise ValueError(f"Invalid SolverConfig.{field}={value!r}. Must be a number > 0.")
        for field, value in (("warmup", self.warmup), ("momentum", self.momentum)):
            if not (is_real(value) and 0 <= value < 1):
                raise ValueError(f"Invalid SolverConfig.{field}={value!r}. Must be in [0, 1).")
        for field in ("weight_decay", "sam_rho"):
            value = getattr(self, field)
            if not (is_real(value) and value >= 0):
                raise ValueError(f"Invalid SolverConfig.{field}={value!r}. Must be a number >= 0.")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        if not pair or not all(is_real(b) and 0 <= b < 1 for b in self.betas):
            raise ValueError(
                f"Invalid SolverConfig.betas={self.betas!r}. Must be two numbers in [0, 1)."
            )
        self._check_unused()

    def _check_unused(self) -> None:
        """An option that the chosen solver would ignore is an error."""
        if self.name == "uniform":
            for field in fields(self):
                if field.name != "name" and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"SolverConfig.{field.name}={getattr(self, field.name)!r} has no meaning "
                        f"with name='uniform', which trains nothing. Leave it out."
                    )
        if self.lr is None and self.name == "sgd":
            raise ValueError(
                "SolverConfig.name='sgd' needs lr: its step has the scale of the gradient, so a "
                "radius in standard deviations has no meaning. Pass lr=..., or use an Adam solver."
            )
        if self.lr is not None and self.radius is not None:
            raise ValueError(
                f"SolverConfig got lr={self.lr} and radius={self.radius}. Give one of them."
            )
        if self.name != "sgd" and self.momentum != 0.9:
            raise ValueError(
                f"SolverConfig.momentum={self.momentum} needs name='sgd', but name={self.name!r}. "
                f"Use betas."
            )
        if self.name == "sgd" and tuple(self.betas) != (0.9, 0.999):
            raise ValueError(
                f"SolverConfig.betas={self.betas} needs an Adam solver, but name='sgd'. Use "
                f"momentum."
            )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where candidates are kept.

    Args:
        kind: ``"memory"``: in main memory, a copy in every process, and in every checkpoint.
            ``"disk"``: a safetensors file each, mapped into memory by the processes of a host;
            checkpoints name the files. ``"auto"``: memory for one process on a host while
            candidates take at most a quarter of what is free; else files.
        dirpath: Directory of the files, the same path on every host; a run has a directory of its
            own in it (``version_0``, ...). ``None`` means ``twa_candidates`` in the Trainer's
            ``default_root_dir``.
        dtype: ``"float32"`` keeps parameters in their own dtype; ``"bfloat16"`` rounds the
            trainable ones, for half the room.

    Raises:
        ValueError: When a value is outside its range, or ``dirpath`` goes with ``"memory"``.
    """

    kind: Literal["auto", "memory", "disk"] = "auto"
    dirpath: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_choice("StorageConfig.kind", self.kind, STORAGES)
        check_choice("StorageConfig.dtype", self.dtype, ("float32", "bfloat16"))
        if self.dirpath is None:
            return
        if not isinstance(self.dirpath, (str, os.PathLike)) or not str(self.dirpath):
            raise ValueError(
                f"Invalid StorageConfig.dirpath={self.dirpath!r}. Must be a directory, or None "
                f"(in the Trainer's default_root_dir)."
            )
        if self.kind == "memory":
            raise ValueError(
                f"StorageConfig.dirpath={str(self.dirpath)!r} needs kind='disk' or 'auto', but "
                f"kind='memory' writes no files."
            )


def check_unit_of_steps(subspace: SubspaceConfig, solver: SolverConfig) -> None:
    """A radius is measured in standard deviations, which only the ``pca`` basis is scaled to.

    Raises:
        ValueError: When another basis goes with a radius.
    """
    if subspace.basis != "pca" and solver.lr is None and solver.name != "uniform":
        raise ValueError(
            f"SubspaceConfig.basis={subspace.basis!r} needs SolverConfig.lr: only basis='pca' "
            f"measures coefficients in standard deviations, which SolverConfig.radius means."
        )
