"""Schedules in optimizer steps: ``phase_steps``, and runs with ``max_steps`` alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from helpers.common import Regressor, loader, trainer, weights
from helpers.ddp import fit as fit_several
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, run
from helpers.runs import fit_fails
from helpers.short import holds_its_average
from lightning_twa import SolverConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use .self.log.'val_loss",
    "ignore:TWACallback.data='val'. trains",
    "ignore:.*callbacks used to create the checkpoint need to be",
    "ignore:Detected KeyboardInterrupt",
)

STEPS = 4  # of an epoch
BY_STEPS = CollectConfig(every_n_train_steps=1)


class Follow(L.Callback):
    """Notes in which phase each optimizer step was taken, and the weights behind it."""

    def __init__(self, twa: TWACallback) -> None:
        self.twa = twa
        self.steps: dict[int, str] = {}
        self.weights: dict[int, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps[trainer.global_step + 1] = self.twa.phase

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights[trainer.global_step] = weights(pl_module)


def fit(path: Path, options: dict[str, Any], **kwargs: Any) -> tuple[TWACallback, Follow, Any]:
    L.seed_everything(2, verbose=False)
    twa = TWACallback(**options)
    follow, module = Follow(twa), Regressor(batchnorm=True)
    train = kwargs.pop("train") if "train" in kwargs else loader()
    callbacks = [twa, follow, *kwargs.pop("callbacks", [])]
    the_trainer = trainer(path, callbacks=callbacks, **kwargs)
    the_trainer.fit(module, train, loader(32, seed=1))
    holds_its_average(twa, module)
    return twa, follow, the_trainer


def first_of_phase(follow: Follow) -> int:
    """The first optimizer step that was not ordinary training's; all behind it are the phase's."""
    kinds = [follow.steps[step] for step in sorted(follow.steps)]
    first = kinds.index("optimize")
    assert set(kinds[:first]) == {"collect"}
    assert set(kinds[first:]) == {"optimize"}
    return first + 1


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # callback, Trainer, first step of the phase, steps of the run
    "the last five": ({"phase_steps": 5}, {"max_epochs": 6}, 20, 24),
    "a whole epoch": ({"phase_steps": 4}, {"max_epochs": 6}, 21, 24),
    "a fraction": ({"phase_steps": 0.25}, {"max_epochs": 6}, 19, 24),
    "of max_steps": ({"phase_steps": 3}, {"max_epochs": -1, "max_steps": 22}, 20, 22),
    "of the first limit": ({"phase_steps": 3}, {"max_epochs": 9, "max_steps": 22}, 20, 22),
    "fraction of max_steps": ({}, {"max_epochs": -1, "max_steps": 40}, 33, 40),
    "within an epoch": ({"start_epoch": 0.7}, {"max_epochs": -1, "max_steps": 33}, 24, 33),
    "both": ({"start_epoch": 3, "phase_steps": 6}, {"max_epochs": 50}, 13, 18),
    "both, a fraction": ({"start_epoch": 3, "phase_steps": 0.05}, {"max_epochs": 50}, 13, 22),
    "both, no other limit": ({"start_epoch": 3, "phase_steps": 6}, {"max_epochs": -1}, 13, 18),
    "both, of max_steps": (
        {"start_epoch": 0.5, "phase_steps": 6}, {"max_epochs": -1, "max_steps": 40}, 21, 26,
    ),
    "never longer": ({"start_epoch": 4, "phase_steps": 600}, {"max_epochs": 6}, 17, 24),
    "accumulation": ({"phase_steps": 3}, {"max_epochs": 8, "accumulate_grad_batches": 3}, 14, 16),
    "one epoch": ({"phase_steps": 2, "collect": BY_STEPS}, {"max_epochs": 1}, 3, 4),
    "one epoch, by a fraction": (
        {"start_epoch": 0.5, "collect": BY_STEPS}, {"max_epochs": -1, "max_steps": 4}, 3, 4,
    ),
    "few batches": ({"phase_steps": 5}, {"max_epochs": 9, "limit_train_batches": 3}, 23, 27),
}  # fmt: skip


@pytest.mark.matrix(7)
@pytest.mark.parametrize("case", CASES)
def test_where_the_phase_begins_and_ends(tmp_path, case, caplog) -> None:
    options, how, first, last = CASES[case]
    twa, follow, the_trainer = fit(tmp_path, options, **how)
    assert first_of_phase(follow) == first
    assert the_trainer.global_step == last
    assert twa._run.averaging.optimization.started["step"] == first - 1
    assert f"trained for {last - first + 1} optimizer step" in caplog.text, "the schedule's length"
    assert the_trainer.max_steps == how.get("max_steps", -1), "the Trainer's own limit is back"


@pytest.mark.parametrize("case", ["the last five", "within an epoch", "one epoch"])
def test_training_before_the_phase_is_as_ever(tmp_path, case) -> None:
    options, how, first, _ = CASES[case]
    _, follow, _ = fit(tmp_path, options, **how)
    L.seed_everything(2, verbose=False)
    plain = Follow(TWACallback(start_epoch=3))
    trainer(tmp_path, callbacks=[plain], **how).fit(
        Regressor(batchnorm=True), loader(), loader(32, seed=1)
    )
    for step in range(1, first):
        assert torch.equal(follow.weights[step], plain.weights[step]), step
    assert not torch.equal(follow.weights[first], plain.weights[first])


WINDOWS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "epochs": ({"phase_steps": 5}, {"max_epochs": 9}, [f"epoch={e}" for e in range(3, 7)]),
    "two at least": ({"phase_steps": 5}, {"max_epochs": 4}, ["epoch=0", "epoch=1"]),
    "every second": (
        {"phase_steps": 1, "collect": CollectConfig(every_n_epochs=2)}, {"max_epochs": 9},
        ["epoch=5", "epoch=7"],
    ),
    "steps": (
        {"phase_steps": 2, "collect": CollectConfig(every_n_train_steps=3)}, {"max_epochs": 4},
        ["step=9", "step=12"],
    ),
    "steps to the very start": (
        {"phase_steps": 4, "collect": CollectConfig(every_n_train_steps=4)}, {"max_epochs": 6},
        ["step=12", "step=16", "step=20"],
    ),
    "start in epochs": (
        {"phase_steps": 5, "collect": CollectConfig(start=1)}, {"max_epochs": 6},
        [f"epoch={e}" for e in range(1, 4)],
    ),
    "start as a fraction": (
        {"phase_steps": 5, "collect": CollectConfig(start=0.5)}, {"max_epochs": 8},
        ["epoch=4", "epoch=5"],
    ),
    "fractions of max_steps": (
        {"start_epoch": 0.75, "collect": CollectConfig(start=0.25)},
        {"max_epochs": -1, "max_steps": 40}, [f"epoch={e}" for e in range(2, 7)],
    ),
    "an epoch, and a fraction of max_steps": (
        {"start_epoch": 7, "collect": CollectConfig(start=0.5)},
        {"max_epochs": -1, "max_steps": 40}, ["epoch=4", "epoch=5", "epoch=6"],
    ),
    "averages": (
        {"phase_steps": 5, "collect": CollectConfig(ema_decays=(0.9,))}, {"max_epochs": 4},
        ["ema(0.9)", "epoch=0", "epoch=1"],
    ),
    "uniform": (
        {"solver": SolverConfig(name="uniform"), "start_epoch": 0.5},
        {"max_epochs": -1, "max_steps": 30}, [f"epoch={e}" for e in range(3, 8)],
    ),
}  # fmt: skip


@pytest.mark.matrix(5)
@pytest.mark.parametrize("window", WINDOWS)
def test_which_candidates_there_are(tmp_path, window) -> None:
    options, how, expected = WINDOWS[window]
    twa, _, _ = fit(tmp_path, options, **how)
    assert twa.candidate_names == expected


@pytest.mark.parametrize("epochs", [3, 4])
def test_data_without_a_length_that_was_seen_in_an_earlier_epoch(tmp_path, epochs) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    data = torch.utils.data.DataLoader(Endless(), 16)
    _, follow, _ = fit(tmp_path, {"phase_steps": 3}, train=data, max_epochs=epochs)
    assert first_of_phase(follow) == STEPS * epochs - 2
    with pytest.raises(ValueError, match="the training data has no length, and there is one epoch"):
        fit(tmp_path, {"phase_steps": 1, "collect": BY_STEPS}, train=data, max_epochs=1)


@pytest.mark.parametrize("data", ["val", "twa"])
def test_other_data_from_the_start_of_the_epoch_on(tmp_path, data) -> None:
    class Hook(Regressor):
        def twa_dataloader(self) -> Any:
            return loader(48, seed=3)

    L.seed_everything(2, verbose=False)
    twa = TWACallback(phase_steps=5, data=data)
    follow, module = Follow(twa), Hook(batchnorm=True)
    the_trainer = trainer(tmp_path, callbacks=[twa, follow], max_epochs=6)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert first_of_phase(follow) == 4 * STEPS + 1
    assert the_trainer.global_step == 4 * STEPS + 2 * (2 if data == "val" else 3)
    holds_its_average(twa, module)


def test_other_data_without_a_length_is_given_steps(tmp_path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield from loader(32, seed=1).dataset

    stream = torch.utils.data.DataLoader(Stream(), 16)
    for options in ({"phase_steps": 7}, {"phase_steps": 7, "start_epoch": 4}):
        twa = TWACallback(data="val", **options)
        follow, module = Follow(twa), Regressor()
        the_trainer = trainer(tmp_path, callbacks=[twa, follow], max_epochs=6, limit_val_batches=2)
        the_trainer.fit(module, loader(), stream)
        holds_its_average(twa, module)
        assert the_trainer.global_step - first_of_phase(follow) + 1 == 7


@pytest.mark.parametrize("options", [{"phase_steps": 3}, {"phase_steps": 0.2}])
def test_cycles(tmp_path, options) -> None:
    twa, follow, _ = fit(tmp_path, {**options, "cycles": 2}, max_epochs=8)
    phase = [step for step, kind in follow.steps.items() if kind == "optimize"]
    assert phase == [14, 15, 16, 30, 31, 32]
    assert twa.candidate_names == ["epoch=5", "epoch=6"]


@pytest.mark.parametrize(
    ("options", "how", "steps"),
    [
        ({"start_epoch": 18}, {"max_epochs": 20}, 8),
        ({"start_epoch": 18}, {"max_epochs": -1, "max_steps": 80}, 8),
        ({"start_epoch": 0.9}, {"max_epochs": -1, "max_steps": 80}, 8),
        ({"phase_steps": 6}, {"max_epochs": 20}, 6),
        ({"phase_steps": 6}, {"max_epochs": -1, "max_steps": 80}, 6),
        ({"phase_steps": 6, "start_epoch": 18}, {"max_epochs": 20}, 6),
    ],
)
def test_early_stopping_begins_a_phase_of_its_length(tmp_path, options, how, steps) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    _, follow, the_trainer = fit(
        tmp_path, {**options, "start_on_early_stopping": True}, callbacks=[stop], **how
    )
    assert first_of_phase(follow) == 2 * STEPS + 1
    assert the_trainer.global_step == 2 * STEPS + steps


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"phase_steps": 6}, {"max_epochs": 5}),
        ({"phase_steps": 6, "collect": CollectConfig(ema_decays=(0.8,))}, {"max_epochs": 5}),
        ({"start_epoch": 2, "phase_steps": 6}, {"max_epochs": 50}),
        ({"start_epoch": 0.6, "collect": BY_STEPS}, {"max_epochs": -1, "max_steps": 17}),
        ({"phase_steps": 2, "cycles": 2, "collect": BY_STEPS}, {"max_epochs": 4}),
    ],
)
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
def test_resuming_anywhere_is_exact(tmp_path, options, how, accumulate) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    how = {**how, "accumulate_grad_batches": accumulate}

    def make() -> TWACallback:
        return TWACallback(**options)

    whole = run(tmp_path, lambda: Regressor(batchnorm=True), make, saver=saver, **how)
    files = sorted(tmp_path.glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    assert len(files) > 5
    for file in files[:-1]:
        resumed = run(tmp_path, lambda: Regressor(batchnorm=True), make, ckpt_path=file, **how)
        assert equal(resumed.steps, whole.steps[-len(resumed.steps) :]), file.stem
        assert equal(resumed.state, whole.state), file.stem
        assert equal(resumed.user, whole.user), file.stem


@pytest.mark.parametrize("both", [False, True])
def test_resuming_with_other_data_is_exact(tmp_path, both) -> None:
    """Lightning counts epochs otherwise where there is a limit in steps as its loops begin."""
    options = {"phase_steps": 3, **({"start_epoch": 3} if both else {})}

    def make() -> TWACallback:
        return TWACallback(**options, data="val", collect=CollectConfig(start=1))

    saver = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    epochs = {"max_epochs": 8 if both else 5}
    whole = run(tmp_path, Regressor, make, saver=saver, **epochs)
    for file in sorted(tmp_path.glob("epoch=*.ckpt")):
        resumed = run(tmp_path, Regressor, make, ckpt_path=file, **epochs)
        assert equal(resumed.state, whole.state), file.stem
        assert equal(resumed.steps, whole.steps[len(whole.steps) - len(resumed.steps) :])


class AtBatches(L.Callback):
    """Saves at the start of each batch, and changes it if asked to."""

    def __init__(self, path: Path | None, changes: bool) -> None:
        self.path, self.changes, self.count = path, changes, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        self.count += 1
        if self.changes:
            batch[0].mul_(0.5)
        if self.path is not None:
            trainer.save_checkpoint(self.path / f"{self.count}.ckpt")


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("options", [{"phase_steps": 3}, {"start_epoch": 3}])
def test_saves_at_the_start_of_batches_change_nothing(tmp_path, changes, options) -> None:
    """Where the phase begins between two batches, too, batches pass for BatchNorm's statistics."""
    found = []
    for path in (None, tmp_path):
        L.seed_everything(2, verbose=False)
        twa, hook, module = TWACallback(**options), AtBatches(path, changes), Regressor(True)
        trainer(tmp_path, callbacks=[twa, hook], max_epochs=4).fit(module, ordered())
        holds_its_average(twa, module)
        found.append((module.state_dict(), twa.averaging_weights, hook.count))
    assert equal(found[0], found[1])
    assert (found[0][2] == 16) is not changes, "hooks are called again only if they change batches"


@pytest.mark.slow
def test_two_processes_begin_at_the_same_step(tmp_path) -> None:
    twa = TWACallback(phase_steps=3, collect=BY_STEPS)
    reports = fit_several(tmp_path, twa, Regressor(batchnorm=True), max_epochs=3)
    kinds = [[phase for phase, _ in report["steps"]] for report in reports]
    assert kinds[0] == kinds[1]
    assert kinds[0][-4:].count("collect") == 1 or "collect" in kinds[0]
    assert equal(reports[0]["state"], reports[1]["state"])


def test_an_exception_in_a_phase_that_began_within_an_epoch(tmp_path) -> None:
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 22 and not trainer.should_stop:
                raise KeyError("planned")

    twa = TWACallback(phase_steps=5)
    module, breaks = Regressor(), Breaks()
    the_trainer = trainer(tmp_path, callbacks=[twa, breaks], max_epochs=6)
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(module, ordered(), loader(32, seed=1))
    assert twa.phase == "optimize"
    the_trainer.callbacks.remove(breaks)
    the_trainer.fit(module, ordered(), loader(32, seed=1))
    holds_its_average(twa, module)
    assert the_trainer.max_steps == -1


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        (
            {"phase_steps": 24}, {},
            "phase_steps=24 leaves no optimizer step to collect candidates in: the run has 24. "
            "Give the phase fewer, or raise max_epochs or max_steps.",
        ),
        (
            {"phase_steps": 5}, {"max_epochs": -1},
            "The phase (phase_steps=5) is counted from the end of the run, but this Trainer has no "
            "limit (max_epochs=-1, max_steps=-1). Set Trainer(max_epochs=...), max_steps or "
            "max_time, or pass start_epoch and phase_steps, an int.",
        ),
        (
            {"phase_steps": 5}, {"max_epochs": 2},
            "TWA needs at least two candidates, but collecting every epoch of epochs 0 to -1 gives "
            "0 before optimizer step 3. Start collecting earlier (CollectConfig.start), collect "
            "more often (every_n_epochs, every_n_train_steps), or begin the phase later.",
        ),
        (
            {"phase_steps": 5, "cycles": 2}, {"max_epochs": -1, "max_steps": 60},
            "cycles=2 divides the run's epochs, but this Trainer has no limit in epochs "
            "(max_epochs=-1, or max_steps alone). Set Trainer(max_epochs=...).",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_training(tmp_path, options, how, message) -> None:
    fit_fails(tmp_path, TWACallback(**options), message, **how)


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, True, "three", float("nan")])
def test_values_of_phase_steps(value) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"Invalid phase_steps={value!r}. Must be a num")
    ):
        TWACallback(phase_steps=value)


def test_a_uniform_average_has_no_phase() -> None:
    with pytest.raises(ValueError, match="phase_steps=5 has no meaning with SolverConfig"):
        TWACallback(phase_steps=5, solver=SolverConfig(name="uniform"))
