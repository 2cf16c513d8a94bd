"""Copies of a run, by ``copy.deepcopy`` and ``pickle``, at any moment of it."""

from __future__ import annotations

import copy

from lightning_twa.phases import saved
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.collect import Collector
from lightning_twa.phases.last_stages import Done, Suspended
from lightning_twa.phases.optimize import Optimization
from lightning_twa.phases.stages import Collecting, Optimizing
from lightning_twa.phases.temporary import TemporaryAverage
from lightning_twa.phases.transitions import Stage

__all__ = ["copied"]


def copied(stage: Stage) -> Stage:
    """The run as if it had been interrupted here: a copy has what a checkpoint has, and nothing of
    the Trainer, the model or the device. A finished run has its average, where no file has it, and
    no candidates.

    Args:
        stage: That the run is in; it and what it has stay as they are.
    """
    now = stage.averaging
    twin = copy.copy(now)  # shares what is not replaced here
    twin.optimization = Optimization(now.settings, now.batches)
    twin.optimization.started = now.optimization.started
    twin.learned = now.averaging_weights
    if isinstance(stage, Done):
        twin.restored_names = now.candidate_names
        twin.temporary = TemporaryAverage()
        twin.collector = Collector(now.settings)
        twin.collector.cycle = now.cycle
        return Done(twin)
    if isinstance(stage, Collecting):
        twin.early_stopped = stage.wants_to_stop()
        if now.collector.count == 0 and now.cycle == 0:  # nothing has been taken yet
            return Collecting(Averaging(now.settings, now.state_key))
    if isinstance(stage, Optimizing) and not now.optimization.failed:
        twin.kept = saved.phase_to_keep(now)
    return Suspended(twin)
