"""A run that is stopped and resumed from any checkpoint equals one that was not, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import EpochOrder, ResumableLoader, differences, equal, ordered, run, saved, twa
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


WRITTEN = {
    "at the end of an epoch": {"save_on_train_epoch_end": True},
    "at the end of validation": {"save_on_train_epoch_end": False},
    "after every step": {"every_n_train_steps": 1},
}


CASES: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    # callback, BatchNorm, Trainer
    "plain Lightning": ({}, False, {}),
    "TWA-t": ({}, False, {}),
    "TWA-v": ({"data": "val"}, False, {}),
    "TWA-t, BatchNorm": ({}, True, {}),
    "TWA-v, BatchNorm": ({"data": "val"}, True, {}),
    "TWA-t, validation within epochs": ({}, True, {"val_check_interval": 2}),
    "TWA-v, interval that does not fit": ({"data": "val"}, True, {"val_check_interval": 3}),
    "uniform average validated": ({"validate_average": True}, True, {"val_check_interval": 2}),
    "accumulated gradients": ({}, False, {"accumulate_grad_batches": 3}),
    "accumulated gradients, TWA-v": ({"data": "val"}, False, {"accumulate_grad_batches": 2}),
    "candidates by steps": (
        {"collect": CollectConfig(start=0, every_n_train_steps=3)},
        False,
        {"accumulate_grad_batches": 2},
    ),
    "candidates by steps, newest two": (
        {"collect": CollectConfig(start=0, every_n_train_steps=2, max_candidates=2)},
        False,
        {},
    ),
    "newest two candidates": (
        {"collect": CollectConfig(start=0, max_candidates=2), "data": "val"},
        False,
        {},
    ),
    "AdamW, a block per tensor": (
        {
            "subspace": SubspaceConfig(blocks="tensor"),
            "solver": SolverConfig(name="adamw", schedule="linear"),
        },
        False,
        {},
    ),
    "four bits": ({"subspace": SubspaceConfig(bits=4)}, True, {}),
    "SGD on the paper's basis": (
        {
            "subspace": SubspaceConfig(basis="candidates"),
            "solver": SolverConfig(name="sgd", lr=0.05, schedule="step"),
        },
        False,
        {},
    ),
}


EVERY_KIND = ("plain Lightning", "TWA-t", "TWA-v", "TWA-v, BatchNorm", "uniform average validated")

# `make test` resumes every case from every fifth step, and one case from every epoch.
SOME = [(c, "after every step", 5) for c in CASES]
SOME += [("TWA-v, BatchNorm", w, 1) for w in WRITTEN if w != "after every step"]
ALL = [(c, w, 1) for c in CASES for w in WRITTEN if c in EVERY_KIND or w == "after every step"]


@pytest.mark.matrix(8)
@pytest.mark.parametrize(
    ("case", "written", "nth"),
    [*SOME, *(pytest.param(*m, marks=pytest.mark.long) for m in ALL if m not in SOME)],
)
def test_a_run_resumed_from_any_checkpoint_equals_an_uninterrupted_one(
    tmp_path, case, written, nth
) -> None:
    kwargs, batchnorm, trainer_kwargs = CASES[case]

    def make_twa() -> TWACallback | None:
        return None if case == "plain Lightning" else twa(**kwargs)

    def make_module() -> Regressor:
        return Regressor(batchnorm)

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, **WRITTEN[written])
    whole = run(tmp_path, make_module, make_twa, saver=saver, **trainer_kwargs)
    checkpoints = saved(tmp_path / "saved")
    per_epoch = {"after every step": 1 if "accumulate" in case else 2}.get(written, 1)
    assert len(checkpoints) >= 6 * per_epoch
    for checkpoint in checkpoints[::nth]:
        resumed = run(tmp_path, make_module, make_twa, ckpt_path=checkpoint, **trainer_kwargs)
        assert differences(whole, resumed) == [], checkpoint.name


def test_a_run_resumed_again_and_again_equals_an_uninterrupted_one(tmp_path) -> None:
    def make() -> TWACallback:
        return twa(data="val", validate_average=True)

    def make_module() -> Regressor:
        return Regressor(batchnorm=True)

    whole = run(tmp_path, make_module, make)
    last: Path | None = None
    for epochs in range(1, 6):  # stops after each epoch, as a queue with a time limit would
        stop = type(
            "Stop",
            (L.Callback,),
            {
                "on_train_epoch_end": lambda self, trainer, module, e=epochs: (
                    trainer.save_checkpoint(tmp_path / f"{e}.ckpt")
                    if trainer.current_epoch == e - 1
                    else None
                ),
                "on_train_epoch_start": lambda self, trainer, module, e=epochs: (
                    (_ for _ in ()).throw(TimeoutError("queue"))
                    if trainer.current_epoch == e
                    else None
                ),
            },
        )()
        L.seed_everything(epochs if last else 1, verbose=False)
        the_trainer = trainer(tmp_path, callbacks=[make(), stop])
        with pytest.raises(TimeoutError, match="queue"):
            the_trainer.fit(make_module(), ordered(), ordered(32, seed=1), ckpt_path=last)
        last = tmp_path / f"{epochs}.ckpt"
    assert differences(whole, run(tmp_path, make_module, make, ckpt_path=last)) == []


@pytest.mark.parametrize("written", ["at the end of validation", "after every step"])
def test_max_steps_without_max_epochs(tmp_path, written) -> None:
    """At the end of an epoch Lightning's own resume of such a run repeats the epoch's number."""
    how = {"max_epochs": -1, "max_steps": 22}
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, **WRITTEN[written])
    whole = run(tmp_path, Regressor, twa, saver=saver, **how)
    assert whole.callback["phase"] == "done"
    checkpoints = saved(tmp_path / "saved")
    assert checkpoints
    for checkpoint in checkpoints:
        resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, **how)
        assert differences(whole, resumed) == [], checkpoint.name


def test_a_loader_that_cannot_go_on_within_an_epoch_still_gives_a_whole_phase(tmp_path) -> None:
    """Lightning repeats the epoch's first batches then; the number of steps is the same."""

    def plain() -> Any:
        return loader()

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1)
    whole = run(tmp_path, Regressor, twa, saver=saver, train=plain)
    for checkpoint in saved(tmp_path / "saved")[11:]:
        step = int(re.search(r"step=(\d+)", checkpoint.stem).group(1))
        if step % 4:
            with pytest.warns(UserWarning, match="your dataloader is not resumable"):
                resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, train=plain)
        else:
            resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, train=plain)
            assert differences(whole, resumed) == []
        assert len(resumed.steps) == 24 - step
        assert resumed.callback["phase"] == "done"


def test_resuming_a_finished_run_changes_nothing(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    whole = run(tmp_path, Regressor, twa, saver=saver)
    resumed = run(tmp_path, Regressor, twa, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert resumed.steps == []
    assert differences(whole, resumed) == []


def test_a_phase_that_was_stopped_within_an_epoch_does_not_train_on(tmp_path) -> None:
    """Its average is finished: a resumed Trainer would take ordinary steps away from it."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == 18

    the_twa, saver = twa(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    the_trainer = trainer(tmp_path, callbacks=[Stop(), the_twa, saver], enable_checkpointing=True)
    module = Regressor()
    the_trainer.fit(module, ordered())
    assert the_twa.phase == "done"
    assert the_trainer.global_step == 18
    the_trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (tmp_path / "epoch=4-step=18.ckpt", tmp_path / "after.ckpt"):
        resumed, recorder = Regressor(), Recorder(the_twa)
        with pytest.raises(RuntimeError, match="was finished, but the Trainer goes on with epoch"):
            trainer(tmp_path, callbacks=[twa(), recorder]).fit(resumed, ordered(), ckpt_path=path)
        assert recorder.steps == []
        assert torch.equal(weights(resumed), weights(module))


def test_the_helper_s_order_is_a_function_of_the_epoch() -> None:
    batches = ordered()
    assert isinstance(batches, ResumableLoader)
    assert isinstance(batches.sampler, EpochOrder)
    first = [x for x, _ in batches]
    assert equal(first, [x for x, _ in batches])
    batches.load_state_dict({"taken": 3})
    assert equal([x for x, _ in batches], first[3:])
    batches.sampler.set_epoch(1)
    assert not equal(first, [x for x, _ in batches])
