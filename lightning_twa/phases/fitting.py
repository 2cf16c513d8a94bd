"""What fits averaged weights: BatchNorm statistics, and singular vectors of spectral norms."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import (
    CandidateFileError,
    averaged_names,
    check_files,
    fit_singular_vectors_,
    has_singular_vectors,
    weights_and_buffers,
)
from lightning_twa.machine import warn
from lightning_twa.phases.averaging import Averaging
from lightning_twa.phases.batchnorm import BATCHES, reestimate_batchnorm
from lightning_twa.trainer import batches_between_validations, batches_seen, epoch_is_ending

__all__ = ["fit_at_switch", "fit_before_validation", "fit_buffers", "put_average_in"]


def fit_buffers(
    averaging: Averaging, trainer: Trainer, module: LightningModule, *, enough: int | None = None
) -> int | None:
    """Compute the buffers that belong to the weights in place; every rank calls it.

    Args:
        averaging: The run.
        trainer: The Trainer.
        module: With averaged weights.
        enough: Batches for weights that are not yet the result; those of an epoch for the result.

    Returns:
        The number of batches; ``None`` when there was nothing to do, or no way to.
    """
    _fit_singular_vectors(averaging, module)
    if averaging.batches.replaying:  # a hook of the user's saves in one
        return None
    at_most = averaging.settings.batchnorm_batches
    with averaging.batches.in_replay():
        batches = reestimate_batchnorm(
            trainer,
            module,
            lambda: averaging.optimization.switch.training_data(trainer),
            max(averaging.epoch_batches or 0, batches_seen(trainer)),
            enough if at_most is None else at_most,
            with_hooks=averaging.batches.changed,
            matters=enough is None,
        )
    averaging.batchnorm = {"batches": batches, "step": trainer.global_step}
    return batches


def _fit_singular_vectors(averaging: Averaging, module: LightningModule) -> None:
    now = weights_and_buffers(module)
    if not has_singular_vectors(now):
        return
    fitting: Mapping[str, Tensor] = {}
    try:
        check_files(averaging.store)
        *_, newest = averaging.store
        fitting = newest.tensors
    except CandidateFileError as error:  # on every rank
        warn(
            f"Spectral norms are computed without the candidate that shows which dimension of a "
            f"square weight they belong to: {error}"
        )
    fit_singular_vectors_(now, fitting)


def fit_at_switch(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """:func:`fit_buffers` for what is saved early in the phase, whose steps go on with them:
    as many batches as a quarter of its steps, so that it does not cost half as much again.
    """
    choice = averaging.optimization.choice
    steps = None if choice is None else choice.total_steps
    enough = BATCHES if steps is None else min(BATCHES, max(8, steps // 4))
    fit_buffers(averaging, trainer, module, enough=enough)


def fit_before_validation(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """In the phase, before a validation: :func:`fit_buffers`, where it takes no more batches than
    there were since the validation before. The same in a run that is resumed.
    """
    between = batches_between_validations(trainer)
    least = averaging.settings.batchnorm_batches or BATCHES
    if epoch_is_ending(trainer) or between is None or between >= least:
        fit_buffers(averaging, trainer, module, enough=BATCHES)


def put_average_in(averaging: Averaging, trainer: Trainer, module: LightningModule) -> None:
    """Put the uniform average of the candidates so far into the model, for a validation."""
    moment = f"before a validation in epoch {trainer.current_epoch}"
    averaging.collector.check_form(module, moment)
    averaging.temporary.put_in(
        module,
        averaging.store,
        lambda: fit_buffers(averaging, trainer, module, enough=BATCHES),
        trainer,
        averaged_names(module, averaging.settings.collect),
    )
