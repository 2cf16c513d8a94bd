"""A checkpoint that somebody saves changes nothing for the run that is saved, in whichever hook."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Regressor, loader, trainer
from helpers.hooks import HOOKS
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "cycles": {"start_epoch": 2, "cycles": 2, "collect": CollectConfig(start=0)},
    "val": {"data": "val"},
    "steps": {"collect": CollectConfig(start=1, every_n_train_steps=3)},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "validated": {"validate_average": True},
    "uniform steps": {
        "solver": SolverConfig(name="uniform"),
        "collect": CollectConfig(start=1, every_n_train_steps=2),
    },
}


class Save(L.Callback):
    """Saves in one hook, whenever it comes."""

    def __init__(self, hook: str, path: Path) -> None:
        self.count = 0

        def save(trainer: L.Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                self.count += 1
                trainer.save_checkpoint(path / f"{self.count}.ckpt")

        setattr(self, hook, save)


def outcome(path: Path, kind: str, hook: str | None, first: bool) -> Any:
    L.seed_everything(1, verbose=False)
    module = Regressor(batchnorm=True)
    start = {"start_epoch": 4, "collect": CollectConfig(start=1)}
    twa = TWACallback(**{**start, **KINDS[kind]})
    savers = [] if hook is None else [Save(hook, path)]
    callbacks = [*savers, twa] if first else [twa, *savers]
    the_trainer = trainer(path, callbacks=callbacks, max_epochs=8)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert all(saver.count > 0 for saver in savers)
    return state(module), twa.averaging_weights, twa.candidate_names, the_trainer.current_epoch


@pytest.mark.matrix(8)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("cycles", "uniform steps") else pytest.param(k, marks=pytest.mark.long)
        for k in KINDS
    ],
)
def test_a_save_changes_nothing(tmp_path: Path, kind: str, first: bool, hook: str) -> None:
    expected = outcome(tmp_path, kind, None, first)
    found = outcome(tmp_path, kind, hook, first)
    assert equal(found, expected)
    assert found[3] == 8


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_of_these_files_holds_the_average(tmp_path: Path, kind: str) -> None:
    expected, *_ = outcome(tmp_path, kind, "on_train_epoch_end", False)
    saved = torch.load(tmp_path / "8.ckpt", weights_only=True)["state_dict"]
    assert equal(dict(saved), expected)


RESUMED: dict[str, dict[str, Any]] = {
    **{kind: KINDS[kind] for kind in ("default", "uniform", "validated")},
    "steps": {"collect": CollectConfig(start=1, every_n_train_steps=3)},
    "averages": {"collect": CollectConfig(start=1, ema_decays=(0.5, 0.9))},
    "uniform steps": {
        "solver": SolverConfig(name="uniform"),
        "collect": CollectConfig(start=1, every_n_train_steps=3, max_candidates=4),
    },
    "cycles": {
        "start_epoch": 2,
        "cycles": 2,
        "collect": CollectConfig(start=0, every_n_train_steps=3, ema_decays=(0.5,)),
    },
    "validated cycles": {**KINDS["cycles"], "validate_average": True},
    "groups": {
        "collect": CollectConfig(start=0, every_n_train_steps=2),
        "subspace": SubspaceConfig(group_size=2, bits=4),
    },
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
}
QUICK = {  # one of each kind of what is due, before and behind the callback
    ("steps", "on_train_batch_end", True),
    ("averages", "on_train_epoch_end", True),
    ("cycles", "on_train_batch_end", False),
    ("validated cycles", "on_validation_end", True),
    ("groups", "on_train_batch_end", True),
    ("mask", "on_train_batch_start", False),
    ("default", "on_validation_start", True),
}


@pytest.mark.matrix(3)
@pytest.mark.filterwarnings("ignore:The 2 candidates are equal")  # with an epoch less between them
@pytest.mark.parametrize(
    ("kind", "hook", "first"),
    [
        pytest.param(*plan, marks=() if plan in QUICK else pytest.mark.long)
        for plan in itertools.product(RESUMED, HOOKS, (True, False))
        if plan[:2] != ("validated cycles", "on_train_epoch_start")  # of two epochs one is lost
    ],
)
def test_from_every_file_a_run_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path: Path, kind: str, hook: str, first: bool
) -> None:
    """Also from one that was saved before the callback's own hook came. From one of the start of an
    epoch or a batch, Lightning itself goes on with an epoch or a batch less, without the callback
    too, with which candidates may be missing that are taken by steps.
    """

    def go(folder: Path, ckpt_path: Path | None = None, *others: L.Callback) -> Any:
        L.seed_everything(1, verbose=False)
        module = Regressor(batchnorm=True)
        twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=1), **RESUMED[kind]})
        callbacks = [*others, twa] if first else [twa, *others]
        the_trainer = trainer(folder, callbacks=callbacks, max_epochs=8)
        the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=ckpt_path)
        assert twa.phase == "done"
        path = [] if twa.averaging_path is None else list(twa.averaging_path)
        return state(module), twa.averaging_weights, twa.candidate_names, path

    saver = Save(hook, tmp_path)
    whole = go(tmp_path, None, saver)
    assert saver.count > 0
    for number in range(1, saver.count + 1, 3 if "batch" in hook else 1):
        found = go(tmp_path, tmp_path / f"{number}.ckpt")
        if hook in ("on_train_epoch_start", "on_train_batch_start"):
            lost = {"on_train_epoch_start": 2, "on_train_batch_start": 1}[hook]
            assert len(whole[2]) - len(found[2]) in range(lost + 1), number
        else:
            assert equal(found, whole), number


@pytest.mark.matrix(3)
@pytest.mark.parametrize("kind", ["default", "uniform", "groups"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumed_from_the_start_of_an_epoch_may_save_there_again(
    tmp_path: Path, first: bool, kind: str
) -> None:
    """Lightning counts one epoch more as started than as ready from there on."""

    def go(folder: Path, ckpt_path: Path | None = None) -> tuple[TWACallback, Save]:
        L.seed_everything(1, verbose=False)
        twa = TWACallback(**{"start_epoch": 5, "collect": CollectConfig(start=0), **KINDS[kind]})
        saver = Save("on_train_epoch_start", folder)
        callbacks = [saver, twa] if first else [twa, saver]
        the_trainer = trainer(folder, callbacks=callbacks, max_epochs=8)
        the_trainer.fit(
            Regressor(batchnorm=True), ordered(), ordered(32, seed=1), ckpt_path=ckpt_path
        )
        return twa, saver

    go(tmp_path)
    for number in (3, 6, 7):
        (tmp_path / f"from_{number}").mkdir()
        twa, saver = go(tmp_path / f"from_{number}", tmp_path / f"{number}.ckpt")
        assert twa.phase == "done"
        assert saver.count == 8 - number + 1
