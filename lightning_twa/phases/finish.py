"""The end of a phase or a run: the average completed, and what is said where there is none."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import averaged_names, check_complete, put_average
from lightning_twa.machine import say, warn
from lightning_twa.phases import saved
from lightning_twa.phases.anew import keep_raw
from lightning_twa.phases.arrival import put_result, tell_what_was_done
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.fitting import fit_buffers
from lightning_twa.phases.report import tell_what_stays, uniform_report
from lightning_twa.trainer import HeldModes, was_stopped_early
from lightning_twa.words import count

__all__ = ["complete_phase", "complete_uniform", "warn_of_no_average", "warn_of_too_few"]


def complete_phase(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """Put the learned average in place, with BatchNorm statistics of its own; of a phase that has
    failed, the uniform one.
    """
    phase = averaging.optimization
    if phase.failed:
        _put_uniform(averaging, trainer, module)
        return
    averaging.record_step(trainer)  # its last, where somebody saves before the callback's own hook
    phase.average_buffers(module)
    weights = put_result(phase, trainer, module, averaging.store)
    batches = fit_buffers(averaging, trainer, module)
    averaging.result = tell_what_was_done(phase, weights, batches)
    _keep_result(averaging, trainer, module, weights)
    if phase.cached is not None:
        phase.cached.delete()


def complete_uniform(averaging: Averaging, trainer: Trainer, module: LightningModule) -> bool:
    """Put the uniform average of the candidates, of which there may be none, in place.

    Returns:
        Whether there was something to average.
    """
    store = averaging.store
    store.drop_damaged()
    averaging.collector.add_averages(module, trainer.global_step)
    n = len(store)
    if n == 0:
        warn(
            f"There is nothing to average: the run ended before epoch "
            f"{averaging.plan.collect_start}. The weights are those of ordinary training."
        )
        return False
    averaging.optimization.started = {
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "epoch_batches": averaging.epoch_batches,
        "validates_each_epoch": False,
    }
    _put_uniform(averaging, trainer, module)
    return True


def _put_uniform(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    check_complete(averaging.store, module)
    keep_raw(averaging, module)
    only = averaged_names(module, averaging.settings.collect)
    put_average(module, averaging.store, only)
    batches = fit_buffers(averaging, trainer, module)
    averaging.keep_uniform()
    say(uniform_report(averaging.store.names, batches))
    tell_what_stays(averaging.settings, module)
    assert averaging.learned is not None
    _keep_result(averaging, trainer, module, averaging.learned)


def _keep_result(
    averaging: Averaging, trainer: Trainer, module: LightningModule, averaging_weights: Tensor
) -> None:
    averaging.learned = averaging_weights
    if averaging.trajectory.points is not None:
        averaging.trajectory.record(averaging_weights)
    if averaging.store.files is not None:
        directory, size = averaging.store.files
        say(
            f"TWA: the candidates stay in {directory} ({size / 2**20:.1f} MiB). Checkpoints "
            f"written before the phase ended need them."
        )
    averaging.temporary.validated = None  # checkpoints have what is in the model from here on
    averaging.modes = HeldModes(trainer)
    averaging.finished.take(module)
    averaging.finished.write(
        trainer,
        averaging.settings.save_average,
        {averaging.state_key: saved.dump(averaging, "done")},
    )


def warn_of_too_few(averaging: Averaging) -> None:
    """Say that the phase cannot begin: of data without a length, or of damaged files. What could be
    known before training was checked then.
    """
    warn(
        f"TWA needs at least two candidates, but collecting {averaging.plan.describe()} "
        f"gave {averaging.collector.count}. Ordinary training goes on."
    )


def warn_of_no_average(averaging: Averaging, trainer: Trainer, had_too_few: bool) -> None:
    """Say why a run ends while it collects.

    Args:
        averaging: The run.
        trainer: At the end of training.
        had_too_few: Whether there were too few candidates when the phase was due.
    """
    if averaging.cycle > 0:
        warn(
            f"Training stopped in part {averaging.cycle + 1} of cycles="
            f"{averaging.settings.cycles}, "
            f"before its phase began: ordinary training has moved the weights on from the "
            f"average of part {averaging.cycle}."
        )
        return
    if averaging.went_on:
        warn(
            f"Training stopped before {averaging.plan.describe_start()} began another phase of the "
            f"finished run that was trained on: ordinary training has moved the weights on from "
            f"where it went on ({averaging.settings.continue_from})."
        )
        return
    candidates, start = len(averaging.candidate_names), averaging.plan.describe_start()
    sooner = "lower start_epoch" if "epoch" in start else "raise phase_steps, or pass start_epoch,"
    found = f"there {'was' if candidates == 1 else 'were'} {count(candidates, 'candidate')}"
    ordinary = "The weights are those of ordinary training."
    if had_too_few:
        warn(
            f"TWA never ran: {found} at {start}, and it needs two. {ordinary} "
            f"Collect earlier, or more often (CollectConfig)."
        )
        return
    text = (
        f"TWA never ran: training stopped after {count(trainer.current_epoch, 'epoch')} and "
        f"{count(trainer.global_step, 'optimizer step')}, before {start} began "
        f"the phase. {ordinary} "
    )
    if was_stopped_early(trainer) and not averaging.settings.start_on_early_stopping:
        text += (
            f"Pass TWACallback(start_on_early_stopping=True), which begins the phase where "
            f"EarlyStopping would end the run; or {sooner} to run it"
        )
    else:
        text += f"{sooner[0].upper()}{sooner[1:]} to run it"
    if averaging.settings.start_on_early_stopping and candidates < 2:
        text += f", or CollectConfig.start: {found}, and start_on_early_stopping needs two"
    warn(f"{text}.")
