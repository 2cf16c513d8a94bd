"""Schedules in optimizer steps, of data whose length is not what it seems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from helpers.common import Regressor, loader, regression_data, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import fit_fails
from helpers.short import holds_its_average

pytestmark = pytest.mark.filterwarnings(
    "ignore:Length of IterableDataset",
    "ignore:Your .IterableDataset. has",
    "ignore:.*callbacks used to create the checkpoint need to",
)
BY_STEPS = CollectConfig(every_n_train_steps=1)


class Stream(IterableDataset):
    """Four batches of sixteen, in one order."""

    def __iter__(self) -> Any:
        yield from regression_data()


class Promising(Stream):
    """Says that it has twice as many."""

    def __len__(self) -> int:
        return 128


def fit(
    path: Path, options: dict[str, Any], data: Any = Stream, ckpt: Any = None, **how: Any
) -> tuple[TWACallback, Regressor, L.Trainer]:
    L.seed_everything(5, verbose=False)
    twa, module = TWACallback(**options), Regressor()
    train = loader() if data is None else DataLoader(data(), 16)
    the_trainer = trainer(path, **{"callbacks": [twa, *how.pop("callbacks", [])], **how})
    the_trainer.fit(module, train, loader(32, seed=1), ckpt_path=ckpt)
    holds_its_average(twa, module)
    return twa, module, the_trainer


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    "options",
    [
        {"phase_steps": 5},
        {"phase_steps": 5, "collect": CollectConfig(every_n_train_steps=2)},
        {"phase_steps": 5, "collect": CollectConfig(ema_decays=(0.9,))},
        {"phase_steps": 0.2, "collect": CollectConfig(start=0.5)},
        {"phase_steps": 5, "collect": CollectConfig(start=0)},
    ],
)
@pytest.mark.parametrize("how", [{}, {"max_steps": 1000}])
def test_a_stream_is_as_data_with_a_length(tmp_path, options, how) -> None:
    """Nothing from before the window stays, though it is not known in the first epoch."""
    sized, one, _ = fit(tmp_path, options, DataLoaderOf, max_epochs=9, **how)
    stream, other, _ = fit(tmp_path, options, max_epochs=9, **how)
    assert stream.candidate_names == sized.candidate_names
    started = [twa._run.averaging.optimization.started for twa in (sized, stream)]
    assert started[0]["step"] == started[1]["step"]
    assert torch.equal(weights(one), weights(other))


class DataLoaderOf(torch.utils.data.Dataset):
    """The same batches, with a length."""

    def __init__(self) -> None:
        self.data = regression_data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]


def test_what_was_seen_counts_and_not_what_data_say(tmp_path) -> None:
    twa, _, the_trainer = fit(tmp_path, {"phase_steps": 5}, Promising, max_epochs=8)
    assert the_trainer.global_step == 32
    assert twa._run.averaging.optimization.started["step"] == 27


@pytest.mark.matrix(3)
@pytest.mark.parametrize("step", [4, 8, 11, 12, 13, 16, 18])
def test_resuming_a_stream_from_every_batch(tmp_path, step) -> None:
    """Lightning counts the batches of an epoch on into the next one, of a run that is resumed
    behind an epoch's last batch. Its data begin anew within an epoch: only the schedule is the
    same.
    """
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"phase_steps": 6, "collect": CollectConfig(start=0)}
    whole, _, _ = fit(tmp_path, options, max_epochs=5, callbacks=[saver], enable_checkpointing=True)
    file = tmp_path / f"step={step}.ckpt"
    resumed, _, the_trainer = fit(tmp_path / "again", options, ckpt=file, max_epochs=5)
    begun = [twa._run.averaging.optimization.started for twa in (whole, resumed)]
    if step % 4 == 0:
        assert the_trainer.global_step == 20
        assert begun[0]["step"] == begun[1]["step"] == 14
        assert begun[0]["steps_in_epoch"] == begun[1]["steps_in_epoch"]
        assert whole.candidate_names == resumed.candidate_names


def test_a_phase_in_the_first_epoch_is_no_soup(tmp_path, caplog) -> None:
    fit(tmp_path, {"phase_steps": 1, "collect": BY_STEPS}, None, max_epochs=1)
    assert "radius 2." in caplog.text


def test_epochs_with_different_numbers_of_steps_are_refused(tmp_path) -> None:
    scheduler = GradientAccumulationScheduler({0: 2, 3: 1})
    the_trainer = trainer(tmp_path, callbacks=[TWACallback(phase_steps=5), scheduler])
    with pytest.raises(ValueError, match="does not go with GradientAccumulationScheduler: epochs"):
        the_trainer.fit(Regressor(), loader())
    assert the_trainer.global_step == 0


def test_cycles_end_with_their_phases_by_themselves() -> None:
    with pytest.raises(ValueError, match="does not go with both start_epoch=2 and phase_steps=3"):
        TWACallback(start_epoch=2, phase_steps=3, cycles=2)


def test_cycles_need_data_with_a_length(tmp_path) -> None:
    twa = TWACallback(phase_steps=3, cycles=2, data="val")
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=8, limit_val_batches=2)
    with pytest.raises(ValueError, match="cycles=2 does not go with data='val' without a length"):
        the_trainer.fit(Regressor(), loader(), DataLoader(Stream(), 16))
    assert the_trainer.global_step == 0


def test_a_start_that_leaves_nothing_names_itself(tmp_path) -> None:
    fit_fails(
        tmp_path,
        TWACallback(0.01),
        "start_epoch=0.01 leaves no optimizer step to collect candidates in: the run has 40. Raise "
        "start_epoch, or raise max_epochs or max_steps.",
        max_epochs=-1,
        max_steps=40,
    )
