"""Which candidates a run takes, and that taking them leaves training as it is."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.common import Recorder, Regressor, loader, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import fit, is_borrowed

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


def test_collecting_leaves_training_as_it_is(tmp_path) -> None:
    shuffling = DataLoader(regression_data(), batch_size=16, shuffle=True)
    L.seed_everything(3, verbose=False)
    twa = TWACallback(start_epoch=4, validate_average=True, collect=CollectConfig(start=0))
    _, with_twa, _ = fit(tmp_path, twa, Regressor(batchnorm=True), train=shuffling)
    L.seed_everything(3, verbose=False)
    plain = Recorder(twa)
    without = trainer(tmp_path, callbacks=[plain], max_epochs=4)
    without.fit(Regressor(batchnorm=True), shuffling, loader(32, seed=1))
    for epoch in range(4):
        assert torch.equal(with_twa.epochs[epoch], plain.epochs[epoch])


def test_candidates_by_optimizer_steps_within_a_window(tmp_path) -> None:
    twa = TWACallback(
        start_epoch=4, collect=CollectConfig(start=1, every_n_train_steps=3, max_candidates=3)
    )
    _, recorder, _ = fit(tmp_path, twa)
    # 4 steps an epoch: epochs 1..3 end at step 16; multiples of 3 from 6 on, the newest three
    assert twa.candidate_names == ["step=9", "step=12", "step=15"]
    names = dict(zip(twa.candidate_names, twa._run.store, strict=True))
    stored = torch.cat([t.double().reshape(-1) for t in names["step=9"].parameters.values()])
    assert torch.equal(stored, recorder.steps[8][1])


def test_every_n_epochs_counts_as_model_checkpoint_does(tmp_path) -> None:
    twa = TWACallback(start_epoch=5, collect=CollectConfig(start=0, every_n_epochs=2))
    fit(tmp_path, twa, max_epochs=6)
    assert twa.candidate_names == ["epoch=1", "epoch=3"]


def test_candidate_steps_count_optimizer_steps_with_accumulation(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0, every_n_train_steps=3))
    fit(tmp_path, twa, train=loader(batch_size=8), accumulate_grad_batches=3)
    # 8 batches an epoch, 3 steps (the last batch of an epoch always steps)
    assert twa.candidate_names == ["step=3", "step=6", "step=9", "step=12"]


@pytest.mark.parametrize(
    ("value", "count", "words"),
    [
        (float("nan"), 1, "1 NaN or infinite value"),
        (float("-inf"), 3, "3 NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("by_steps", [False, True])
def test_a_candidate_that_is_not_finite_names_tensor_and_candidate(
    tmp_path, value, count, words, by_steps
) -> None:
    class Diverges(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 16:  # the last of epoch 3
                with torch.no_grad():
                    pl_module.net[0].weight.view(-1)[:count] = value

    collect = CollectConfig(start=2, every_n_train_steps=4 if by_steps else None)
    name = "step=16" if by_steps else "epoch=3"
    twa = TWACallback(start_epoch=4, collect=collect)
    the_trainer = trainer(tmp_path, callbacks=[Diverges(), twa])
    message = (
        f"Candidate '{name}', tensor 'net.0.weight', holds {words}: training has diverged. Lower "
        f"the learning rate, or clip gradients, before weights are averaged."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(Regressor(), loader())
    assert not is_borrowed(the_trainer)
    assert twa.candidate_names == (["step=12"] if by_steps else ["epoch=2"])
