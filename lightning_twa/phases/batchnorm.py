"""Re-estimation of BatchNorm statistics.

Averaged weights meet activations that no snapshot's running statistics describe, so the statistics
are computed anew: the cumulative average over training batches of each batch's mean and variance
(the procedure of Izmailov et al., arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_twa.machine import all_ranks, mean_over_ranks_
from lightning_twa.trainer import loader_batches, modules_in_training, training_steps

__all__ = ["reestimate", "reestimate_batchnorm", "tracked_batch_norms"]


def tracked_batch_norms(model: nn.Module, training: Collection[nn.Module]) -> list[_BatchNorm]:
    """The BatchNorm layers with running statistics that training updates.

    Args:
        model: The model.
        training: Modules that are in training mode during training; a BatchNorm that the user keeps
            in evaluation mode has statistics of its own that must not change.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and module in training
    ]


def reestimate(layers: Collection[_BatchNorm], forward: Callable[[], int]) -> int:
    """Compute the layers' running statistics anew and average them over ranks.

    Args:
        layers: From :func:`tracked_batch_norms`.
        forward: Runs training batches through the model, without gradients and with the layers in
            training mode; returns the number of batches.

    Returns:
        The number of batches. With 0 of them, or on an error, the statistics are as before.
    """
    with _cumulative(layers) as keep_old:
        batches = forward()
        if batches == 0:
            keep_old()
    mean_over_ranks_(layer.running_mean for layer in layers)  # type: ignore[misc]
    mean_over_ranks_(layer.running_var for layer in layers)  # type: ignore[misc]
    return batches


@contextmanager
def _cumulative(layers: Collection[_BatchNorm]) -> Iterator[Callable[[], None]]:
    """Reset the statistics and make them a cumulative average; momentum is restored at the end, and
    the statistics too if the body fails or calls what it is given.
    """
    momenta = [layer.momentum for layer in layers]
    saved = [
        {name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers
    ]

    def keep_old() -> None:
        for layer, buffers in zip(layers, saved, strict=True):
            for name, value in buffers.items():
                getattr(layer, name).copy_(value)

    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's sign for a cumulative average
        yield keep_old
    except BaseException:
        keep_old()
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def reestimate_batchnorm(
    trainer: Trainer, module: LightningModule, get_loader: Callable[[], Any], seen: int
) -> int | None:
    """Compute BatchNorm statistics for the weights in place; every rank calls it.

    Args:
        trainer: The Trainer.
        module: The module.
        get_loader: :meth:`TrainerSwitch.user_training_loader`.
        seen: Batches of an epoch of data without a length.

    Returns:
        The number of batches; ``None`` when there was nothing to do, or, with a warning, no way to.
    """
    training = modules_in_training(trainer, module)
    layers = tracked_batch_norms(module, training)
    if not layers:
        return None
    problem: Exception | None = None

    def forward() -> int:
        nonlocal problem
        batches = 0
        try:
            loader = get_loader()
            limit = loader_batches(loader)
            batches = training_steps(
                trainer, module, loader, training, seen if limit is None else limit
            )
        except Exception as error:  # a training_step that needs gradients, say
            problem = error
        device = trainer.strategy.root_device
        return batches if all_ranks(problem is None and batches > 0, device) else 0

    batches = reestimate(layers, forward)
    if batches == 0:
        reason = f"{type(problem).__name__}: {problem}" if problem else "there was no batch"
        rank_zero_warn(
            f"BatchNorm statistics could not be re-estimated for the averaged weights "
            f"({reason}); they are left as training had them. Re-estimate them with "
            f"torch.optim.swa_utils.update_bn before you use the model."
        )
        return None
    return batches
