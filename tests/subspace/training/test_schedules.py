"""Learning rates over the steps of the phase."""

from __future__ import annotations

import pytest
import reference

from lightning_twa import SolverConfig
from lightning_twa.subspace.training.schedules import peak_within, schedule_factor, schedule_sum


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


def test_values_written_down_by_hand() -> None:
    def factors(schedule: str, total: int, warmup: float = 0.0) -> list[float]:
        config = SolverConfig(schedule=schedule, warmup=warmup)
        return [schedule_factor(config, step, total) for step in range(total + 1)]

    assert factors("cosine", 4) == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert factors("cosine", 6, 1 / 3) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )
    assert factors("linear", 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert factors("step", 4) == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert factors("step", 100)[49:51] == [1.0, 0.1]
    assert factors("step", 100)[74:76] == [0.1, 0.01]
    assert factors("constant", 4, 0.25) == pytest.approx([0.5, 1, 1, 1, 1])


def test_a_warm_up_as_long_as_the_phase() -> None:
    config = SolverConfig(warmup=0.9)
    assert [schedule_factor(config, step, 2) for step in (0, 1, 2)] == pytest.approx(
        [1 / 3, 2 / 3, 1.0]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_past_its_end_a_schedule_stays_at_zero(schedule) -> None:
    config = SolverConfig(schedule=schedule)
    assert schedule_factor(config, 10, 10) == pytest.approx(0)
    assert schedule_factor(config, 15, 10) == pytest.approx(0)


def test_a_constant_rate_needs_no_length() -> None:
    assert schedule_factor(SolverConfig(schedule="constant"), 0, None) == 1.0
    assert schedule_factor(SolverConfig(schedule="constant"), 7, None) == 1.0


def test_a_peak_that_spends_a_budget_on_the_steps_that_are_left() -> None:
    config = SolverConfig(schedule="linear", warmup=0.0)  # 1, 0.75, 0.5, 0.25
    assert schedule_sum(config, 4) == pytest.approx(2.5)
    assert schedule_sum(config, 4, 2) == pytest.approx(0.75)
    assert peak_within(config, 5.0, 0, 4) == pytest.approx(2.0)
    assert peak_within(config, 1.5, 2, 4) == pytest.approx(2.0)
    assert peak_within(config, -1.0, 2, 4) == 0.0
    assert peak_within(config, 1.0, 4, 4) == float("inf")
