"""Where a phase has arrived: the result put into the model, and what is told of it."""

from __future__ import annotations

import time

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import Store
from lightning_twa.machine import say
from lightning_twa.phases import report, span
from lightning_twa.phases.optimize import Optimization
from lightning_twa.results import Result
from lightning_twa.subspace import in_float64

__all__ = ["put_result", "tell_what_was_done"]


def put_result(
    phase: Optimization, trainer: Trainer, module: LightningModule, store: Store
) -> Tensor:
    """Write what the phase has arrived at, or where held-out data speak for that, the point of
    its path that was best, or its start.

    Args:
        phase: That ends.
        trainer: The Trainer.
        module: The module.
        store: The candidates.

    Returns:
        Its averaging weights, ``(n, B)``.
    """
    optimizer, selection = phase.optimizer, phase.selection
    assert optimizer is not None
    weights = phase.averaging_weights
    assert weights is not None
    if phase.groups is not None:
        weights = phase.groups.result(in_float64(optimizer.averaging_weights).cpu())
    replaced = phase.parameters is not None and phase.parameters.replaced_in(module)
    optimizer.write_parameters()  # nothing else than what the coefficients say
    if phase.groups is not None or optimizer.parametrization.samples or replaced:
        weights = _exactly(phase, module, store, weights)
    phase.measure(trainer, module, at_end=True)
    verdict = selection.verdict(phase.steps)
    if verdict is None:
        return weights
    free = selection.origin is not None and phase.groups is None
    if not verdict:  # the start
        weights = selection.weights_of_start(weights.shape[1])
        verdict = {"raw": torch.zeros_like(optimizer.raw)} if free else {}
    else:
        weights = verdict["averaging_weights"]
    if "raw" not in verdict or replaced:
        return _exactly(phase, module, store, weights)
    optimizer.raw.copy_(verdict["raw"])
    optimizer.write_parameters()
    return weights


def _exactly(phase: Optimization, module: LightningModule, store: Store, weights: Tensor) -> Tensor:
    """Write an average of the candidates, or else leave what the phase ended with; returns the
    averaging weights of what is there.
    """
    assert phase.optimizer is not None
    if span.put_exactly(module, store, phase.optimizer, weights):
        return weights
    phase.selection.stays = True
    now = phase.averaging_weights
    assert now is not None
    return now


def tell_what_was_done(
    phase: Optimization, averaging_weights: Tensor, batchnorm_batches: int | None
) -> Result:
    """See :func:`lightning_twa.phases.report.finish_report`."""
    assert phase.optimizer is not None
    seconds = time.perf_counter() - phase.began
    lines = report.finish_report(
        phase.optimizer,
        averaging_weights,
        phase.steps_before + phase.optimizer.steps,
        None if phase.choice is None else phase.choice.total_steps,
        phase.skipped_before + phase.optimizer.skipped_steps,
        batchnorm_batches,
        "" if phase.selection.chose else str(phase.selection.training_loss),
        seconds,
        phase.selection.chose and phase.selection.verdict(phase.steps) is None,
    )
    for line in lines:
        say(line)
    result = phase.selection.result(phase.steps, seconds)
    if phase.settings.heldout is not None:
        say(f"TWA: {result}")
    return result
