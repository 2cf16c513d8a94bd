"""Trainer internals that phase.py relies on: a failure names what a Lightning release changed."""

from __future__ import annotations

import dataclasses
import inspect
from functools import reduce

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.types import LRSchedulerConfig

from helpers.common import Regressor, loader, trainer
from lightning_twa import phase


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> L.Trainer:
    """Some names exist only once a run has begun."""
    the_trainer = trainer(tmp_path_factory.mktemp("run"), max_epochs=1)
    the_trainer.fit(Regressor(), loader(), loader())
    return the_trainer


@pytest.mark.parametrize("path", phase.PRIVATE_NAMES)
def test_trainer_has_the_private_name(path: str, fitted: L.Trainer) -> None:
    try:
        reduce(getattr, path.split("."), fitted)
    except AttributeError as error:
        pytest.fail(f"This Lightning has no Trainer.{path} ({error}); phase.py needs another way.")


def test_fit_loop_prepares_data_only_where_none_is_prepared() -> None:
    source = inspect.getsource(_FitLoop.setup_data)
    assert "if self._combined_loader is not None and not self._should_reload_train_dl" in source, (
        "FitLoop.setup_data decides differently when to prepare data: TrainerSwitch.install_loader "
        "sets _combined_loader to None to have it prepared anew."
    )


def test_early_stopping_decides_in_one_method() -> None:
    source = inspect.getsource(EarlyStopping)
    assert source.count("self._run_early_stopping_check(trainer)") == 2, (
        "EarlyStopping decides elsewhere: stopping.py wraps _run_early_stopping_check."
    )
    assert "wait_count" in EarlyStopping("loss").state_dict()


def test_scheduler_config_has_a_frequency() -> None:
    names = {field.name for field in dataclasses.fields(LRSchedulerConfig)}
    assert {"frequency", "interval", "scheduler"} <= names


def test_module_has_the_batch_transfer_hooks() -> None:
    assert callable(Regressor()._on_before_batch_transfer)


def test_no_other_file_reads_trainer_internals() -> None:
    from pathlib import Path

    package = Path(phase.__file__).parent
    internals = ("fit_loop", "epoch_loop", "_data_source", "_combined_loader", "val_check")
    for path in package.rglob("*.py"):
        if path.name != "phase.py":
            used = [name for name in internals if f".{name}" in path.read_text()]
            assert not used, f"{path.name} reads Trainer internals {used}; move that to phase.py."
