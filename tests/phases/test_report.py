"""The numbers in the text that a person reads."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from helpers.common import loader
from helpers.plain import TWACallback
from helpers.runs import fit
from lightning_twa import SolverConfig
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


@pytest.mark.parametrize("heldout", ["auto", None])
def test_report_says_when_coefficients_press_against_the_budget(tmp_path, caplog, heldout) -> None:
    full_batch = loader(batch_size=64)
    for radius in (50.0, 0.05):
        caplog.clear()
        L.seed_everything(1, verbose=False)
        twa = TWACallback(start_epoch=4, solver=SolverConfig(radius=radius), heldout=heldout)
        # held-out data that favour what training does
        fit(tmp_path, twa, train=full_batch, val=full_batch, max_epochs=14)
        assert "phase finished after 10 optimizer steps in " in caplog.text
        pressed = ", of SolverConfig.radius=0.05, and held-out data favour the end of the path."
        # training alone would always go further: without held-out data there is no advice
        assert (pressed in caplog.text) is (radius == 0.05 and heldout == "auto")
        if radius == 0.05 and heldout == "auto":
            assert twa.result.accepted == twa.result.steps
            assert "they ended 0.05 from the" in caplog.text
