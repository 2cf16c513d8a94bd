"""Learning rates over the steps of the phase."""

from __future__ import annotations

import pytest
import reference

from lightning_twa import SolverConfig
from lightning_twa.subspace.training.schedules import schedule_factor, schedule_sum


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_schedules_follow_their_formulas(schedule, total, warmup) -> None:
    config = SolverConfig(schedule=schedule, warmup=warmup)
    found = [schedule_factor(config, step, total) for step in range(total)]
    expected = [reference.factor(schedule, step, total, warmup) for step in range(total)]
    assert found == pytest.approx(expected)
    assert schedule_sum(config, total) == pytest.approx(sum(expected))
    assert sum(found) > 0
