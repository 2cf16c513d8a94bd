"""Schedules resolve as documented, and the count of candidates ahead is what a run takes."""

from __future__ import annotations

import itertools

import pytest

from helpers.plain import CollectConfig
from lightning_twa.phases.plan import resolve_epoch, resolve_plans
from lightning_twa.phases.schedule import CollectPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.mark.parametrize(
    ("value", "epochs", "expected"),
    [(7, None, 7), (0.8, 60, 48), (0.7, 10, 7), (0.29, 100, 29), (0.5, 7, 3), (0.0, 5, 0)],
)
def test_epochs_and_fractions(value, epochs, expected) -> None:
    assert resolve_epoch("start_epoch", value, epochs) == expected


def test_a_fraction_needs_a_number_of_epochs() -> None:
    with pytest.raises(ValueError, match=r"start_epoch=0\.5 is a fraction of the run, but this"):
        resolve_epoch("start_epoch", 0.5, None)


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [(30, 1, 15), (7, 1, 3), (3, 1, 1), (2, 1, 0), (10, 3, 5), (10, 4, 3), (8, 4, 3)],
)
def test_the_default_window_is_the_second_half_or_holds_two(start, every, expected) -> None:
    (plan,) = resolve_plans(start, CollectConfig(every_n_epochs=every), 100)
    assert plan.collect_start == expected
    assert sum(plan.takes_epoch_end(e) for e in range(start)) >= 2


@pytest.mark.parametrize(
    ("start", "collect", "epochs", "message"),
    [
        (10, {}, 10, r"start_epoch=10 must be below max_epochs=10"),
        (0.0, {}, 10, r"start_epoch=0\.0 leaves no epoch to collect"),
        (
            1,
            {},
            10,
            r"at least two candidates, but collecting every epoch of epochs 0 to 0 gives 1",
        ),
        (5, {"start": 5}, 10, r"CollectConfig\.start=5 \(epoch 5\) must be below start_epoch=5"),
        (5, {"start": 0.5}, 10, r"start=0\.5 \(epoch 5\) must be below start_epoch=5"),
        (9, {"start": 4, "every_n_epochs": 5}, 10, r"every 5 epochs of epochs 4 to 8 gives 1"),
    ],
)
def test_windows_that_cannot_work_are_refused(start, collect, epochs, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_plans(start, CollectConfig(**collect), epochs)


@pytest.mark.parametrize("every_steps", [None, 1, 2, 3, 7])
def test_the_count_ahead_is_what_a_run_takes_from_any_epoch_on(every_steps) -> None:
    grid = itertools.product((0, 1, 3), (4, 6), (1, 2, 3), (1, 4, 5))
    for collect_start, start_epoch, every_epochs, per_epoch in grid:
        plan = CollectPlan(
            collect_start=collect_start,
            start_epoch=start_epoch,
            end=start_epoch + 2,
            every_n_epochs=every_epochs,
            every_n_train_steps=every_steps,
            max_candidates=None,
        )
        for begin in range(start_epoch + 2):
            taken, steps = 0, begin * per_epoch
            for epoch in range(begin, start_epoch + 2):
                for _ in range(per_epoch):
                    steps += 1
                    taken += plan.takes_step(epoch, steps)
                taken += plan.takes_epoch_end(epoch)
            assert plan.count_ahead(begin, begin * per_epoch, per_epoch) == taken
    if every_steps is not None:
        assert plan.count_ahead(0, 0, None) is None


@pytest.mark.parametrize(("epochs", "cycles"), [(12, 3), (16, 3), (9, 2), (23, 4)])
def test_plans_of_cycles_are_one_plan_moved(epochs, cycles) -> None:
    plans = resolve_plans(0.5, CollectConfig(), epochs, cycles=cycles)
    bounds = [0, *[plan.end for plan in plans]]
    assert bounds[-1] == epochs
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= epochs // cycles + 1
    for first, plan in zip(bounds, plans, strict=False):
        (alone,) = resolve_plans(0.5, CollectConfig(), plan.end - first)
        assert plan.start_epoch == first + alone.start_epoch
        assert plan.collect_start == first + alone.collect_start
