"""Ordinary training behind an average: the next part of a run, or more of a finished one."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.candidates import put_back, weights_and_buffers
from lightning_twa.machine import say
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.placing import place_plans
from lightning_twa.phases.temporary import TemporaryAverage

__all__ = ["begin_cycle", "go_on", "keep_raw"]


def begin_cycle(averaging: Averaging, trainer: Trainer) -> None:
    """Train as usual from the learned average on, and collect for the next part of the run."""
    _collect_anew(averaging, trainer)
    averaging.collector.cycle += 1
    place_plans(averaging.collector, trainer, averaging.epoch_batches)


def go_on(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """Train a finished run on, and collect anew.

    Raises:
        ValueError: When there will be too few candidates, or the weights to go on from were not
            kept; the average is as it was.
    """
    if averaging.settings.continue_from == "raw" and averaging.raw is None:
        raise ValueError(
            "continue_from='raw' goes on from the weights before the average, but this run has not "
            "kept them: it was finished without continue_from='raw'. Use 'average', or resume from "
            "a checkpoint of before the phase."
        )
    averaging.meet_model(module)
    switch = averaging.optimization.switch
    switch.leave(trainer)
    place_plans(averaging.collector, trainer, averaging.epoch_batches)
    averaging.collector.check_length(trainer, switch.request_data(trainer), anew=True)
    _collect_anew(averaging, trainer)
    averaging.early_stopped, averaging.went_on = False, True
    averaging.store.max_candidates = averaging.plan.max_candidates
    averaging.store.evenly = averaging.plan.evenly
    start, averaging.raw = averaging.raw, None
    if start is not None:
        put_back(module, start)
    averaging.collector.catch_up(trainer, module, anew=True)
    what = "its average" if start is None else "the weights before its average"
    say(f"TWA: the finished run is trained on from {what}, and candidates are collected anew.")


def keep_raw(averaging: Averaging, module: LightningModule) -> None:
    """Before an average takes their place: keep the weights, if they are to be gone on from."""
    if averaging.settings.continue_from == "raw" and averaging.raw is None:
        now = weights_and_buffers(module)
        averaging.raw = {name: t.detach().to("cpu", copy=True) for name, t in now.items()}


def _collect_anew(averaging: Averaging, trainer: Trainer) -> None:
    averaging.modes.release()
    averaging.optimization.forget()  # before the state of the user's optimizer comes back
    averaging.optimization.switch.leave(trainer)
    averaging.collector.begin_anew(trainer)
    # what was learned and validated belongs to other candidates
    averaging.learned, averaging.block_names, averaging.restored_names = None, [], []
    averaging.trajectory.clear()
    averaging.result = None
    averaging.temporary = TemporaryAverage()
