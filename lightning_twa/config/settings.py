"""The arguments of the callback, and what of them contradicts each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from lightning_twa.config.collect import CollectConfig
from lightning_twa.config.reading import read_fields
from lightning_twa.config.solver import SolverConfig, check_unit_of_steps
from lightning_twa.config.storage import StorageConfig
from lightning_twa.config.subspace import SubspaceConfig
from lightning_twa.config.values import (
    as_epoch,
    check_choice,
    check_count,
    check_epoch_or_fraction,
    is_int,
)

__all__ = ["DATA", "Settings"]

SAVED = (".ckpt", ".pt", ".pth", ".bin")  # what may hold an average
POWER = CollectConfig().power_averages
START = 0.8  # of the run, where an average without a phase begins
# Of the run's steps, at least, and at most a thirtieth, where no length is given: measured, see
# docs/contributing/defaults.md
SHARE, LEAST, MOST = 0.01, 32, 30
DISTRIBUTE = ("auto", "replicate", "shard")
HELD_OUT = ("auto", "val", "twa")
DATA = {  # what the coefficients can be trained on, in words
    "train": "the training data",
    "val": "the validation data",
    "twa": "the data of twa_dataloader()",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :class:`~lightning_twa.TWACallback`, which documents them.

    Raises:
        ValueError: When an argument is outside its range or two contradict each other.
    """

    start_epoch: int | float | None
    data: Literal["train", "val", "twa"]
    collect: CollectConfig
    subspace: SubspaceConfig
    solver: SolverConfig
    storage: StorageConfig
    distribute: Literal["auto", "replicate", "shard"]
    validate_average: bool
    save_average: bool | str | os.PathLike[str] = True
    batchnorm_batches: int | None = None
    cycles: int = 1
    start_on_early_stopping: bool = False
    continue_from: Literal["average", "raw"] | None = None
    phase_steps: int | float | None = None
    heldout: Literal["auto", "val", "twa"] | None = "auto"

    def __post_init__(self) -> None:
        read_fields(self)
        check_choice("data", self.data, tuple(DATA))
        check_choice("heldout", self.heldout, HELD_OUT, "nothing is chosen")
        check_choice("distribute", self.distribute, DISTRIBUTE)
        object.__setattr__(self, "start_epoch", as_epoch(self.start_epoch))
        check_epoch_or_fraction("start_epoch", self.start_epoch, "phase_steps before the end")
        if self.start_epoch is None and self.uniform:
            object.__setattr__(self, "start_epoch", START)
        object.__setattr__(self, "phase_steps", as_epoch(self.phase_steps))
        _check_phase_steps(self.phase_steps)
        if not isinstance(self.validate_average, bool):
            raise ValueError(
                f"Invalid validate_average={self.validate_average!r}. Must be True or False."
            )
        _check_save_average(self.save_average)
        check_count("batchnorm_batches", self.batchnorm_batches, 1, "those of an epoch")
        check_choice(
            "continue_from", self.continue_from, ("average", "raw"), "a finished run does not go on"
        )
        _check_cycles(self)
        _check_uniform(self)
        check_unit_of_steps(self.subspace, self.solver)

    @property
    def uniform(self) -> bool:
        """Whether the average is uniform, and no phase is trained."""
        return self.solver.name == "uniform"

    @property
    def length_is_given(self) -> bool:
        """Whether the phase has a number of steps, and not epochs."""
        return self.phase_steps is not None or self.start_epoch is None

    @property
    def length_in_words(self) -> str:
        """Of a phase whose length is given, for messages."""
        steps = self.phase_steps
        return "the default length" if steps is None else f"phase_steps={steps}"

    @property
    def rate_is_constant(self) -> bool:
        """Whether the learning rate of the phase does not depend on its length."""
        return self.solver.lr is not None and self.solver.schedule == "constant"

    def steps_of_phase(self, length: int | None) -> int | None:
        """Optimizer steps of the phase of a run of so many; ``None`` where that is not known, or
        the phase has epochs.
        """
        steps = self.phase_steps
        if isinstance(steps, int):
            return steps
        if length is None or not self.length_is_given:
            return None
        if steps is None:
            return max(min(max(_round(SHARE * length), LEAST), length // MOST), 1)
        return max(_round(steps * length), 1)

    @property
    def power_averages(self) -> tuple[float, ...]:
        """Those that are kept: of a phase with training before it."""
        return () if self.uniform or self.start_epoch == 0 else self.collect.power_averages

    @property
    def num_averages(self) -> int:
        """Candidates that the phase has beside snapshots and files; two with the power averages."""
        power = len(self.power_averages)
        return len(self.collect.ema_decays) + (power + 2 if power else 0)


def _round(value: float) -> int:
    """Without the noise of floats: 0.7 * 10 is 7.000000000000001."""
    return int(round(value, 6))


def _check_phase_steps(value: object) -> None:
    """
    Raises:
        ValueError: When it is no number of steps.
    """
    share = isinstance(value, float) and 0.0 < value < 1.0
    if not (value is None or share or (is_int(value) and value >= 1)):  # type: ignore[operator]
        raise ValueError(
            f"Invalid phase_steps={value!r}. Must be a number of optimizer steps (int >= 1), a "
            f"fraction of the run's (float in (0, 1)), or None (the default)."
        )


def _check_save_average(where: object) -> None:
    """
    Raises:
        ValueError: When it is no name of a checkpoint.
    """
    if not isinstance(where, (bool, str, os.PathLike)) or where == "":
        raise ValueError(
            f"Invalid save_average={where!r}. Must be True (beside the checkpoints), the name of a "
            f"file, or False."
        )
    if isinstance(where, bool) or os.fspath(where).endswith(os.sep) or os.path.isdir(where):
        return  # a directory is named with a remedy before training
    if os.path.splitext(where)[1].lower() not in SAVED:
        raise ValueError(
            f"Invalid save_average={os.fspath(where)!r}. It is a checkpoint: end its name in one "
            f"of {', '.join(SAVED)}."
        )


def _check_cycles(settings: Settings) -> None:
    """What concerns one phase has no meaning with several.

    Raises:
        ValueError: Naming the argument.
    """
    cycles = settings.cycles
    if not is_int(cycles) or cycles < 1:
        raise ValueError(f"Invalid cycles={cycles!r}. Must be an int >= 1.")
    if not isinstance(settings.start_on_early_stopping, bool):
        raise ValueError(
            f"Invalid start_on_early_stopping={settings.start_on_early_stopping!r}. Must be True "
            f"or False."
        )
    if cycles == 1:
        return
    if settings.collect.checkpoints is not None:
        raise ValueError(
            f"cycles={cycles} does not go with CollectConfig.checkpoints: candidates from files "
            f"belong to one phase. Use cycles=1."
        )
    if settings.phase_steps is not None and settings.start_epoch is not None:
        raise ValueError(
            f"cycles={cycles} does not go with both start_epoch={settings.start_epoch} and "
            f"phase_steps={settings.phase_steps}: the run would end with the first phase. Use one "
            f"of the two."
        )
    if settings.continue_from is not None:
        raise ValueError(
            f"cycles={cycles} does not go with continue_from={settings.continue_from!r}: a longer "
            f"run would have other cycles. Use one of them."
        )
    if settings.start_on_early_stopping:
        raise ValueError(
            f"cycles={cycles} does not go with start_on_early_stopping=True, which makes the phase "
            f"the end of the run. Use one of them."
        )


def _check_uniform(settings: Settings) -> None:
    """What concerns the training of coefficients has no meaning without any.

    Raises:
        ValueError: Naming the argument.
    """
    if not settings.uniform:
        return
    values = {
        "data": (settings.data, "train"),
        "subspace": (settings.subspace, SubspaceConfig()),
        "distribute": (settings.distribute, "auto"),
        "start_on_early_stopping": (settings.start_on_early_stopping, False),
        "phase_steps": (settings.phase_steps, None),
        "heldout": (settings.heldout, "auto"),
        "CollectConfig.power_averages": (settings.collect.power_averages, POWER),
        "CollectConfig.checkpoints": (settings.collect.checkpoints, None),
    }
    for name, (value, default) in values.items():
        if value not in (default, None, ()):
            raise ValueError(
                f"{name}={value!r} has no meaning with SolverConfig(name='uniform'), which trains "
                f"no coefficients. Leave it out."
                + (" Average files with lightning_twa.average()." if "check" in name else "")
            )
