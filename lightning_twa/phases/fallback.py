"""A phase that fails: the training before it is not lost. The run ends with the uniform average of
its candidates, which are kept in files, and says how the phase can be run from these.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.candidates import averaged_names, check_complete, keep_in_files, put_average
from lightning_twa.machine import in_common, warn
from lightning_twa.phases.anew import keep_raw
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.beginning import enter_phase
from lightning_twa.phases.fitting import fit_at_switch
from lightning_twa.phases.guard import is_common
from lightning_twa.trainer import prepare_data, shards_parameters, step_was_taken
from lightning_twa.words import count

__all__ = ["begin_phase", "follow_phase"]


def begin_phase(
    averaging: Averaging,
    trainer: Trainer,
    module: LightningModule,
    *,
    within_epoch: bool = False,
) -> None:
    """Switch into the phase, or, where that fails, to its uniform average. Before the first batch
    of a ``fit`` an error is an error: nothing is lost by it.

    Args:
        averaging: The run.
        trainer: The Trainer.
        module: The module.
        within_epoch: Between two batches, and not at the start of an epoch.
    """
    averaging.temporary.free()
    try:
        keep_raw(averaging, module)
        enter_phase(averaging, trainer, module, within_epoch=within_epoch)
        fit_at_switch(averaging, trainer, module)
    except Exception as error:
        if not averaging.has_trained or not is_common(error):
            raise
        if averaging.settings.data != "train":
            prepare_data(trainer)  # the phase's own may have been installed
        averaging.optimization.started = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "epoch_batches": averaging.epoch_batches,
            "validates_each_epoch": False,
        }
        _fall_back(averaging, trainer, module, error, "could not begin")


def follow_phase(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """In the phase, after a batch: what follows it; or fall back, and then let the run end."""
    phase = averaging.optimization
    if not phase.failed:
        try:
            averaging.follow_phase(trainer, module)
        except Exception as error:
            if not is_common(error):
                raise
            step = trainer.global_step - phase.started["step"]
            _fall_back(averaging, trainer, module, error, f"failed in its optimizer step {step}")
    if phase.failed and averaging.in_last_cycle and step_was_taken(trainer):
        # Not before a step: checkpoint callbacks save once at each
        trainer.should_stop = True


def _fall_back(
    averaging: Averaging, trainer: Trainer, module: LightningModule, error: Exception, what: str
) -> None:
    """Put the uniform average in place, and let the Trainer's steps change nothing.

    Raises:
        Exception: The error, where there is no uniform average either.
    """
    store = averaging.store
    store.drop_damaged()  # of a phase that was resumed they may not have been looked at yet
    n = len(store)
    averaging.collector.averages.clear()  # they are candidates by now, or cannot be
    try:
        with in_common():
            check_complete(store, module)
            put_average(module, store, averaged_names(module, averaging.settings.collect))
    except Exception as second:
        raise error from second
    if averaging.optimization.cached is not None:
        averaging.optimization.cached.delete()
    averaging.optimization.stand_still(trainer)
    averaging.keep_uniform()
    then = (
        "The run ends with the uniform average of its"
        if averaging.in_last_cycle
        else "This cycle ends with the uniform average of its"
    )
    warn(
        f"The TWA phase {what} ({type(error).__name__}: {error}). {then} {count(n, 'candidate')}. "
        f"{_how_to_run_it(averaging, trainer)}"
    )


def _how_to_run_it(averaging: Averaging, trainer: Trainer) -> str:
    if shards_parameters(trainer):
        return (
            "To run the phase with other settings, resume from a checkpoint that was written while "
            "candidates were collected."
        )
    root = averaging.collector.root
    try:
        directory = keep_in_files(averaging.store, root)
    except (OSError, TypeError, ValueError) as error:
        return (
            f"The candidates could not be written to {root} ({error}): save those in "
            f"callback.candidates before this process ends."
        )
    collect = averaging.settings.collect
    given = [f"checkpoints={str(directory)!r}"]
    given += [f"include={collect.include!r}"] * (collect.include is not None)
    given += [f"exclude={collect.exclude!r}"] * bool(collect.exclude)
    return (
        f"The candidates are in {directory}. To run the phase with other settings, fit again with "
        f"TWACallback(start_epoch=0, collect=CollectConfig({', '.join(given)})), a new "
        f"Trainer, whose max_epochs are those of the phase, and the same module and data."
    )
