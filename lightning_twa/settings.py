"""The arguments of the callback, and what of them contradicts each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_twa.config import (
    CollectConfig,
    SolverConfig,
    StorageConfig,
    SubspaceConfig,
    is_int,
)

__all__ = ["Settings", "check_cycles", "check_uniform"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :class:`~lightning_twa.TWACallback`, which documents them."""

    start_epoch: int | float
    data: Literal["train", "val", "twa"]
    collect: CollectConfig
    subspace: SubspaceConfig
    solver: SolverConfig
    storage: StorageConfig
    distribute: Literal["auto", "replicate", "shard"]
    validate_average: bool
    cycles: int = 1
    start_on_early_stopping: bool = False


def check_uniform(settings: Settings) -> None:
    """What concerns the training of coefficients has no meaning without any.

    Raises:
        ValueError: Naming the argument.
    """
    if settings.solver.name != "uniform":
        return
    values = {
        "data": (settings.data, "train"),
        "subspace": (settings.subspace, SubspaceConfig()),
        "distribute": (settings.distribute, "auto"),
        "start_on_early_stopping": (settings.start_on_early_stopping, False),
        "CollectConfig.checkpoints": (settings.collect.checkpoints, None),
    }
    for name, (value, default) in values.items():
        if value != default:
            raise ValueError(
                f"{name}={value!r} has no meaning with SolverConfig(name='uniform'), which trains "
                f"no coefficients. Leave it out."
                + (" Average files with lightning_twa.average()." if "check" in name else "")
            )


def check_cycles(settings: Settings) -> None:
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
    if settings.start_on_early_stopping:
        raise ValueError(
            f"cycles={cycles} does not go with start_on_early_stopping=True, which makes the phase "
            f"the end of the run. Use one of them."
        )
