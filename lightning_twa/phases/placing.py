"""Where in a run that trains the schedule falls that is counted in optimizer steps."""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch import Trainer

from lightning_twa.candidates import drop
from lightning_twa.phases.by_steps import Position, length_of, place
from lightning_twa.phases.collect import Collector
from lightning_twa.trainer import batches_in_all, steps_for, steps_per_epoch

__all__ = ["place_plans", "position"]


def position(
    collector: Collector, trainer: Trainer, epoch_batches: int | None, *, within_epoch: bool
) -> Position:
    """Where the run is, in optimizer steps.

    Args:
        collector: That follows the run.
        trainer: The Trainer.
        epoch_batches: Batches of the last whole epoch of training.
        within_epoch: Between two batches, and not at the start of an epoch.
    """
    per_epoch, seen = steps_per_epoch(trainer), steps_for(trainer, epoch_batches)
    if seen is not None:  # data may have fewer batches than they say
        per_epoch = seen if per_epoch is None else min(per_epoch, seen)
    trained = batches_in_all(trainer, trained=True) - collector.epoch_began
    return Position(
        epoch=trainer.current_epoch,
        steps=trainer.global_step,
        steps_in_epoch=trained // trainer.accumulate_grad_batches if within_epoch else 0,
        per_epoch=per_epoch,
        max_steps=trainer.max_steps,
        by_time=collector.timed.steps,
    )


def place_plans(
    collector: Collector,
    trainer: Trainer,
    epoch_batches: int | None,
    *,
    within_epoch: bool = False,
    narrows: bool = False,
) -> None:
    """Place what is counted in steps; see :func:`lightning_twa.phases.by_steps.place`.

    Args:
        collector: Whose plans they are.
        trainer: The Trainer.
        epoch_batches: Batches of the last whole epoch of training.
        within_epoch: Between two batches, and not at the start of an epoch.
        narrows: Whether candidates have been taken before it was known where the window is: those
            from before it are left out.
    """
    collector.timed.look(trainer, collector.plan.start_step)
    now = position(collector, trainer, epoch_batches, within_epoch=within_epoch)
    before = collector.plan
    for i in range(collector.cycle, len(collector.plans)):
        plan = collector.plans[i]
        if i > collector.cycle:  # where it will be if all epochs have as many steps
            start = plan.first * (now.per_epoch or 0)
            if now.last_step is not None and start >= now.last_step:
                break  # it will not be reached
            now = replace(now, epoch=plan.first, steps=start, steps_in_epoch=0)
        else:
            collector.averages.set_length(length_of(plan, now))
        collector.plans[i] = place(plan, collector.settings, now)
    plan, store = collector.plan, collector.store
    if store.max_candidates is None:
        store.max_candidates, store.evenly = plan.max_candidates, plan.evenly
    known = before.start_step is not None or plan.start_step is None
    if not narrows or (known and now.by_time is None):
        return
    early = {name for name in store.names if not plan.has_named(name, now.per_epoch)}
    drop(store, early - set(store.given_names))
    by_steps = plan.collect_start_step is not None and trainer.global_step < plan.collect_start_step
    begins_with = trainer.current_epoch + within_epoch  # the next epoch that has not begun
    if by_steps or plan.first < plan.collect_start >= begins_with:
        collector.averages.clear_window()
