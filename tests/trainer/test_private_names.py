"""Trainer internals that the package relies on: a failure names what a release changed."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import reduce
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.types import LRSchedulerConfig

import lightning_twa
from helpers.common import ROOT, Regressor, loader, trainer
from lightning_twa.trainer.private_names import PRIVATE_NAMES


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> L.Trainer:
    """Some names exist only once a run has begun."""
    the_trainer = trainer(tmp_path_factory.mktemp("run"), max_epochs=1)
    the_trainer.fit(Regressor(), loader(), loader())
    return the_trainer


@pytest.mark.parametrize("path", PRIVATE_NAMES)
def test_trainer_has_the_private_name(path: str, fitted: L.Trainer) -> None:
    try:
        reduce(getattr, path.split("."), fitted)
    except AttributeError as error:
        pytest.fail(f"This Lightning has no Trainer.{path} ({error}); trainer/ needs another way.")


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


INTERNALS = ("fit_loop", "epoch_loop", "_data_source", "_combined_loader", "val_check", "val_loop")


def test_no_other_room_reads_trainer_internals() -> None:
    package = Path(lightning_twa.__file__).parent
    for path in package.rglob("*.py"):
        if "trainer" not in path.relative_to(package).parts:
            used = [name for name in INTERNALS if f".{name}" in path.read_text()]
            assert not used, f"{path.name} reads Trainer internals {used}; move that to trainer/."


def test_what_the_room_reads_is_listed() -> None:
    """Attributes of a loop, a strategy or a precision plugin: none can change unseen."""
    package = Path(lightning_twa.__file__).parent / "trainer"
    named = {part for path in PRIVATE_NAMES for part in path.split(".")}
    public = {"max_epochs", "max_steps", "flattened", "limits", "reset", "model", "mode", "scaler"}
    for path in package.glob("*.py"):
        found = re.findall(
            r"(?:loop|strategy|precision_plugin|progress)\.(_?[a-z]\w*)", path.read_text()
        )
        unknown = set(found) - named - public
        assert not unknown, f"{path.name} reads {unknown}: add them to PRIVATE_NAMES."


def test_contributors_read_why_each_name_is_used() -> None:
    page = (ROOT / "docs" / "contributing" / "lightning.md").read_text()
    assert [name for name in PRIVATE_NAMES if f"`{name}`" not in page] == []
