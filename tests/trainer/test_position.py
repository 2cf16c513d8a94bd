"""Where a run is: its last step, its validation within epochs, its epochs without an end."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from helpers.common import weights
from helpers.plain import TWACallback
from helpers.runs import fit


def test_max_steps_with_endless_epochs(tmp_path) -> None:
    twa = TWACallback(start_epoch=2)
    _, recorder, the_trainer = fit(tmp_path, twa, max_epochs=-1, max_steps=11)
    assert the_trainer.global_step == 11
    assert twa.phase == "done"
    assert sum(phase != "collect" for phase, _ in recorder.steps) == 3


@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_val_check_interval_longer_than_the_phase_s_data(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, data="val")
    _, _, the_trainer = fit(tmp_path, twa, val_check_interval=3)
    assert twa.phase == "done"
    assert the_trainer.val_check_interval == 3


@pytest.mark.parametrize("interval", [2, 0.5])
def test_validation_within_an_epoch_sees_the_weights_the_next_step_starts_from(
    tmp_path, interval
) -> None:
    class AtValidation(L.Callback):
        def __init__(self) -> None:
            self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.seen: torch.Tensor | None = None

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.seen, self.phase = weights(pl_module), twa.phase

        def on_train_batch_start(self, trainer, pl_module, *args):
            if self.seen is not None and twa.phase == "optimize" and self.phase == "optimize":
                self.pairs.append((self.seen, weights(pl_module)))
            self.seen = None

    at_validation = AtValidation()
    twa = TWACallback(start_epoch=4)
    fit(
        tmp_path,
        twa,
        val_check_interval=interval,
        callbacks=[at_validation],
        num_sanity_val_steps=0,
    )
    assert len(at_validation.pairs) == 3  # the last validation has no step after it
    assert all(torch.equal(seen, used) for seen, used in at_validation.pairs)
