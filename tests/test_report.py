"""The numbers in the text that a person reads."""

from __future__ import annotations

import pytest
import torch

from lightning_twa.report import effective_candidates


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
