"""The numbers in the text that a person reads."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Regressor, loader
from helpers.plain import TWACallback
from helpers.runs import fit
from lightning_twa import SolverConfig
from lightning_twa.phases.report import FEW, LossRecord
from lightning_twa.results import effective_candidates


def test_effective_candidates_is_n_for_the_uniform_average_and_one_for_one() -> None:
    assert effective_candidates(torch.full((8, 1), 1 / 8)) == pytest.approx(8)
    assert effective_candidates(torch.tensor([[0.0], [1.0], [0.0]])) == pytest.approx(1)
    both = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    assert effective_candidates(both) == pytest.approx(1.5), "the mean over the blocks"


def test_effective_candidates_is_at_least_one_with_negative_weights() -> None:
    weights = torch.randn(20, 50, dtype=torch.float64)
    weights /= weights.sum(0)
    for block in weights.T:
        assert 1 <= effective_candidates(block.unsqueeze(1)) <= 20


@pytest.mark.parametrize(("count", "few"), [(2, 1), (5, 2), (9, 4), (16, 8), (100, 8)])
def test_losses_are_means_of_as_many_first_and_last_batches(count, few) -> None:
    record = LossRecord()
    assert str(record) == ""
    for i in range(count):
        # as Lightning divides it where batches are accumulated
        record.add({"loss": torch.tensor(float(i) / 5)}, 5)
        record.add({"other": 3}, 5)  # of a module that skips a batch
        record.add(None, 5)
    first, last = sum(range(few)) / few, sum(range(count - few, count)) / few
    batches = "batch" if few == 1 else f"{few} batches"
    assert str(record) == f"loss {first:.4g} in the first {batches}, {last:.4g} in the last"
    assert few <= FEW


def test_the_loss_is_that_of_a_batch_where_batches_are_accumulated(tmp_path, caplog) -> None:
    seen: list[float] = []

    class Seeing(Regressor):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            seen.append(float(loss.detach()))
            return loss

    fit(tmp_path, TWACallback(start_epoch=2), Seeing(), max_epochs=4, accumulate_grad_batches=2)
    assert f"4 batches, {sum(seen[-4:]) / 4:.4g} in the last" in caplog.text


def test_report_says_when_coefficients_press_against_the_budget(tmp_path, caplog) -> None:
    full_batch = loader(batch_size=64)
    for radius in (50.0, 0.05):
        caplog.clear()
        L.seed_everything(1, verbose=False)
        twa = TWACallback(start_epoch=4, solver=SolverConfig(radius=radius))
        fit(tmp_path, twa, train=full_batch, max_epochs=14)
        assert "phase finished after 10 optimizer steps in " in caplog.text
        assert (
            "they ended 0.05 from the uniform average, of SolverConfig.radius=0.05" in caplog.text
        ) is (radius == 0.05)
