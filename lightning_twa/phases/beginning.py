"""The beginning of a phase: whether it is due, and the switch."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.machine import say
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.by_steps import phase_stops
from lightning_twa.phases.placing import position

__all__ = ["enter_phase", "phase_is_due"]


def phase_is_due(averaging: Averaging, trainer: Trainer, *, within_epoch: bool = False) -> bool:
    """Whether the phase begins now.

    Args:
        averaging: The run.
        trainer: The Trainer.
        within_epoch: Between two batches, and not at the start of an epoch.
    """
    plan, own_data = averaging.plan, averaging.settings.data != "train"
    if within_epoch and (plan.start_step is None or own_data):
        return False
    if plan.start_step is not None and trainer.global_step >= plan.start_step:
        return True
    return (plan.start_step is None or own_data) and trainer.current_epoch >= plan.start_epoch


def enter_phase(
    averaging: Averaging, trainer: Trainer, module: LightningModule, *, within_epoch: bool
) -> None:
    """Switch into the phase. On an error the Trainer is as it was.

    Args:
        averaging: The run.
        trainer: The Trainer.
        module: The module.
        within_epoch: Between two batches, and not at the start of an epoch.
    """
    plan, phase = averaging.plan, averaging.optimization
    averaging.collector.add_averages(module, trainer.global_step)
    phase.end = plan.end
    now = position(averaging.collector, trainer, averaging.epoch_batches, within_epoch=within_epoch)
    stops = phase_stops(
        plan,
        averaging.settings,
        now,
        early=averaging.early_stopped,
        sized=phase.switch.sized,
    )
    if now.by_time is not None and "stops_at_step" in stops:
        say(
            f"TWA: the Trainer's time ends this run after some {now.by_time} optimizer steps, as "
            f"far as those so far tell; the phase ends it after step {stops['stops_at_step']}."
        )
    try:
        phase.started = phase.switch.borrow(
            trainer, averaging.epoch_batches, stops, now.steps_in_epoch
        )
        phase.enter(trainer, module, averaging.store)
    except BaseException:
        averaging.release()
        raise
    averaging.learned, averaging.block_names = None, phase.block_names
    averaging.trajectory.clear()
    averaging.record()
