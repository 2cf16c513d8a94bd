"""The runs that checkpoints of earlier versions were written in, and how they are gone on from.

``fixtures/write.py`` writes the checkpoints, once in each version; ``test_earlier_versions.py``
goes on from them. A case that has been written stays as it is: change one, and its files are those
of another run.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from helpers.common import Regressor, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import ordered, state
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig

__all__ = [
    "CANDIDATES",
    "CASES",
    "FIXTURES",
    "Case",
    "Saver",
    "end_of",
    "fit",
    "machine",
    "ordered",
    "path_of",
    "trainer",
]

FIXTURES = Path(__file__).parent / "fixtures"
CANDIDATES = "twa_candidates"  # the storage directory, where ``inspect`` looks for it


# --- models


class Normed(Regressor):
    """With BatchNorm."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)


class Frozen(Normed):
    """Its first layer is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Unfrozen(Frozen):
    """Its first layer is trained from epoch 2 on, and made so only then, as BackboneFinetuning
    does: resumed later, nothing but the checkpoint says so.
    """

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.net[0].requires_grad_(True)


class WithData(Normed):
    """With data of its own for the coefficients."""

    def twa_dataloader(self) -> DataLoader:
        return ordered(48, seed=2)


def write_soup(folder: Path) -> None:
    """Three models around one, as state dicts."""
    folder.mkdir()
    torch.manual_seed(5)
    module = Normed()
    for name in "abc":
        around = {
            k: v + 0.2 * torch.randn_like(v) if isinstance(p, nn.Parameter) else v
            for (k, v), p in zip(
                state(module).items(), module.state_dict(keep_vars=True).values(), strict=True
            )
        }
        torch.save(around, folder / f"{name}.pt")


# --- cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and the moments at which its checkpoints are written.

    Args:
        twa: The callback, given the folder of the files that belong to the case.
        stages: Moment to the phase in that checkpoint. ``"step=10"``: after so many optimizer
            steps; ``"validation=2"``, ``"epoch=2"``: at the end of validation in, and at the end
            of, that 0-based epoch.
        due: Moments behind which something is due (a candidate, the phase, a cycle) that a resumed
            run does when training starts.
        module: The model.
        callbacks: Further callbacks, before this one.
        max_epochs: Of 4 batches each, 3 with ``data="val"`` or ``"twa"`` in the phase. No ``step``
            is that of the last batch of an epoch, or of the batch before it.
        options: Further arguments of the Trainer.
        files: Writes the files that the run reads, into a folder that is not there yet.
    """

    twa: Callable[[Path], TWACallback]
    stages: dict[str, str]
    due: frozenset[str] = frozenset()
    module: Callable[[], L.LightningModule] = Regressor
    callbacks: Callable[[], list[L.Callback]] = list
    max_epochs: int = 6
    options: dict[str, Any] = field(default_factory=dict)
    files: Callable[[Path], None] | None = None


def usual(**kwargs: Any) -> Callable[[Path], TWACallback]:
    """Candidates of epochs 1 to 3, the phase in epochs 4 and 5, unless told otherwise."""
    return lambda folder: TWACallback(
        **{"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs}
    )


def on_disk(dtype: str = "float32", **kwargs: Any) -> Callable[[Path], TWACallback]:
    """The same with candidates in files."""
    return lambda folder: usual(
        storage=StorageConfig(kind="disk", dirpath=str(folder / CANDIDATES), dtype=dtype), **kwargs
    )(folder)


def phase(name: str = "full_matrix_adam", **subspace: Any) -> dict[str, Any]:
    """A case of which the phase is what matters, after its second step."""
    lr = None if subspace.get("basis", "pca") == "pca" and name != "sgd" else 0.05
    twa = usual(subspace=SubspaceConfig(**subspace), solver=SolverConfig(name=name, lr=lr))
    return {"twa": twa, "stages": {"step=18": "optimize"}}


BEFORE_AND_IN = {"step=10": "collect", "epoch=2": "collect", "step=18": "optimize"}
EVERYWHERE = {**BEFORE_AND_IN, "epoch=4": "optimize", "epoch=5": "done"}
CYCLES = {"step=14": "collect", "epoch=3": "done", "step=18": "collect", "epoch=5": "collect"}

CASES: dict[str, Case] = {
    # --- what is collected, and where it is kept
    "plain": Case(
        twa=usual(),
        module=Normed,
        stages={
            "validation=2": "collect",
            **EVERYWHERE,
            "epoch=3": "collect",
            "validation=4": "optimize",
            "validation=5": "done",
        },
        due=frozenset({"validation=2", "epoch=3"}),
    ),
    "running_averages": Case(
        twa=usual(collect=CollectConfig(start=1, ema_decays=(0.5, 0.9))),
        module=Frozen,
        stages=EVERYWHERE,
    ),
    "unfrozen": Case(
        twa=usual(collect=CollectConfig(start=0)),
        module=Unfrozen,
        stages={"step=6": "collect", "step=18": "optimize", "epoch=4": "optimize"},
    ),
    "validated_average": Case(
        twa=usual(validate_average=True),
        module=Normed,
        stages={"validation=2": "collect", **EVERYWHERE},
        due=frozenset({"validation=2"}),
    ),
    "by_steps": Case(
        twa=usual(collect=CollectConfig(start=0, every_n_train_steps=3, max_candidates=3)),
        stages=BEFORE_AND_IN,
    ),
    "bfloat16": Case(
        twa=usual(storage=StorageConfig(dtype="bfloat16")),
        module=Normed,
        stages=BEFORE_AND_IN,
    ),
    "disk": Case(
        twa=on_disk(collect=CollectConfig(start=1, ema_decays=(0.9,))),
        module=Frozen,
        stages=EVERYWHERE,
    ),
    "disk_bfloat16": Case(
        twa=on_disk(
            "bfloat16", collect=CollectConfig(start=0, every_n_train_steps=3, max_candidates=3)
        ),
        module=Normed,
        stages=BEFORE_AND_IN,
    ),
    # --- how the phase is trained
    "four_bits": Case(**phase(bits=4, blocks="tensor")),
    "rank": Case(**phase(rank=1, blocks=20, bits=16)),
    "adamw": Case(**phase("adamw", basis="candidates")),
    "sgd": Case(**phase("sgd")),
    "orthonormal": Case(**phase(basis="orthonormal")),
    "simplex": Case(**phase(parametrization="simplex")),
    "mask": Case(**phase(parametrization="mask", mask_size=2)),
    "groups": Case(
        twa=usual(collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=2)),
        stages={"step=18": "optimize", "step=22": "optimize"},  # in the first and second group
    ),
    "sam": Case(
        twa=usual(
            solver=SolverConfig(sam_rho=0.5, weight_decay=0.1, schedule="linear", radius=1.0)
        ),
        stages={"step=18": "optimize"},
    ),
    "data_val": Case(
        twa=usual(data="val"),
        module=Normed,
        stages={"step=17": "optimize", "epoch=4": "optimize"},
    ),
    "data_twa": Case(
        twa=usual(data="twa"),
        module=WithData,
        options={"val_check_interval": 4},  # which does not fit the 3 batches of the phase
        stages={"step=18": "optimize", "epoch=4": "optimize"},
    ),
    "accumulated": Case(
        twa=usual(data="val"),
        module=Normed,
        options={"accumulate_grad_batches": 2},
        stages={"step=5": "collect", "step=9": "optimize"},
    ),
    # --- when the phase begins
    "early_stopping": Case(  # which wants to end the run after epoch 2
        twa=usual(start_epoch=6, collect=CollectConfig(start=0), start_on_early_stopping=True),
        module=Normed,
        callbacks=lambda: [
            EarlyStopping("val_loss", patience=2, min_delta=9.0, check_on_train_epoch_end=True)
        ],
        max_epochs=8,
        stages={
            "step=6": "collect",
            "epoch=2": "collect",
            "step=14": "optimize",
            "epoch=3": "optimize",
            "epoch=4": "done",
        },
        due=frozenset({"epoch=2"}),
    ),
    "soup": Case(
        twa=lambda folder: TWACallback(
            0, collect=CollectConfig(checkpoints=str(folder / "soup" / "*.pt"))
        ),
        module=Normed,
        max_epochs=2,
        files=lambda folder: write_soup(folder / "soup"),
        stages={"step=2": "optimize", "epoch=0": "optimize", "epoch=1": "done"},
    ),
    "cycles": Case(
        twa=usual(start_epoch=3, cycles=2),
        module=Normed,
        max_epochs=8,
        stages={
            **{**CYCLES, "step=14": "optimize"},
            "step=26": "collect",
            "step=30": "optimize",
            "epoch=7": "done",
        },
        due=frozenset({"epoch=3"}),
    ),
    # --- without one
    "uniform": Case(
        twa=usual(solver=SolverConfig(name="uniform"), collect=CollectConfig(start=2)),
        module=Normed,
        stages={"step=14": "collect", "epoch=3": "collect", "epoch=5": "done"},
    ),
    "uniform_cycles": Case(
        twa=usual(solver=SolverConfig(name="uniform"), collect=CollectConfig(start=1), cycles=2),
        max_epochs=8,
        stages={**CYCLES, "epoch=7": "done"},
        due=frozenset({"epoch=3"}),
    ),
}


# --- runs


def path_of(folder: Path, case: str, moment: str) -> Path:
    """A checkpoint of a case, in the folder of its files."""
    return folder / f"{CASES[case].stages[moment]}-{moment}.ckpt"


class Saver(Checkpoint):
    """Writes a checkpoint at each of some moments, where ``ModelCheckpoint`` would."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    def _save(self, trainer: L.Trainer, moment: str) -> None:
        if moment in self.paths and not self.paths[moment].exists():
            trainer.save_checkpoint(self.paths[moment])

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, f"step={trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._save(trainer, f"validation={trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._save(trainer, f"epoch={trainer.current_epoch}")


def fit(
    case: Case,
    folder: Path,
    root: Path,
    *,
    twa: TWACallback,
    before: Sequence[L.Callback] = (),
    after: Sequence[L.Callback] = (),
    ckpt_path: Path | None = None,
) -> tuple[L.Trainer, L.LightningModule]:
    """Run a case; from a checkpoint the model starts from other weights, which must not show.

    Args:
        case: The case.
        folder: Where the files are that belong to it.
        root: Where the Trainer may write.
        twa: The callback, from ``case.twa(folder)``.
        before: Callbacks before it.
        after: Callbacks after it.
        ckpt_path: The checkpoint to go on from.
    """
    L.seed_everything(1 if ckpt_path is None else 99, verbose=False)
    module = case.module()
    the_trainer = trainer(
        root,
        callbacks=[*case.callbacks(), *before, twa, *after],
        max_epochs=case.max_epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in after),
        **case.options,
    )
    the_trainer.fit(module, ordered(), ordered(48, seed=1), ckpt_path=ckpt_path)
    return the_trainer, module


def end_of(module: L.LightningModule, twa: TWACallback) -> dict[str, Any]:
    """What a run ends with."""
    return {
        "state_dict": state(module),
        "averaging_weights": twa.averaging_weights,
        "candidate_names": twa.candidate_names,
        "block_names": twa.block_names,
    }


def machine() -> dict[str, str]:
    """What decides the last bits of a sum."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # The name alone may be that of a whole line of processors
    names = ("cpu family", "model", "model name")
    pairs = [tuple(part.strip() for part in line.partition(":")[::2]) for line in lines]
    found = {key: value for key, value in pairs if key in names}  # of the last core
    return {
        "torch": torch.__version__,
        "cpu": ", ".join(found[key] for key in names if key in found) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
