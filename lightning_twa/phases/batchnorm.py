"""Re-estimation of BatchNorm statistics.

Averaged weights meet activations that no snapshot's running statistics describe, so the statistics
are computed anew: the average over training batches of each batch's mean and variance (the
procedure of Izmailov et al., arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_twa.machine import all_ranks, gather_objects, mean_over_ranks_, world_size
from lightning_twa.trainer import batch_hooks, loader_batches, modules_in_training, training_steps

__all__ = ["BATCHES", "reestimate", "reestimate_batchnorm", "tracked_batch_norms"]

BATCHES = 50  # where not all of an epoch are needed; see docs/benchmarks.md

_SCRIPTED = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
_Step = Callable[[], AbstractContextManager[None]]


def tracked_batch_norms(model: nn.Module, training: Collection[nn.Module]) -> list[Any]:
    """The BatchNorm layers with running statistics that training updates, scripted ones too.

    Args:
        model: The model.
        training: Modules that are in training mode during training; a BatchNorm that the user keeps
            in evaluation mode has statistics of its own that must not change.
    """
    return [
        module
        for module in model.modules()
        if (isinstance(module, _BatchNorm) or getattr(module, "original_name", "") in _SCRIPTED)
        and getattr(module, "running_mean", None) is not None
        and getattr(module, "running_var", None) is not None
        and getattr(module, "num_batches_tracked", None) is not None
        and getattr(module, "momentum", 0.1) != 0
        and module in training
    ]


class _Statistics:
    """Sums of the layers' statistics of each batch. A layer that runs several times in a step
    counts once.
    """

    def __init__(self, layers: Collection[Any]) -> None:
        self.layers = list(layers)
        self._before = [
            {name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers
        ]
        self._momenta = [getattr(layer, "momentum", 0.1) for layer in layers]
        self._sums = [
            tuple(
                torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
                for b in (layer.running_mean, layer.running_var)
            )
            for layer in layers
        ]
        self._batches = [torch.zeros_like(layer.num_batches_tracked) for layer in layers]

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Let plain layers average over the calls of one step; scripted ones cannot."""
        plain = [layer for layer in self.layers if isinstance(layer, _BatchNorm)]
        momenta = [layer.momentum for layer in plain]
        try:
            for layer in plain:
                layer.momentum = None  # torch's sign for a cumulative average
            yield
        finally:
            for layer, momentum in zip(plain, momenta, strict=True):
                layer.momentum = momentum

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: take its statistics."""
        for layer in self.layers:
            layer.running_mean.zero_()
            layer.running_var.zero_()
            layer.num_batches_tracked.zero_()
        yield
        for i, layer in enumerate(self.layers):
            calls = layer.num_batches_tracked
            share: Tensor | float = 1.0
            if not isinstance(layer, _BatchNorm) and self._momenta[i] is not None:
                times = calls.clamp(min=1).to(self._sums[i][0].dtype)
                share = 1 - (1 - self._momenta[i]) ** times
            for total, found in zip(
                self._sums[i], (layer.running_mean, layer.running_var), strict=True
            ):
                total.add_(found.to(total.dtype) / share)
            self._batches[i] += calls > 0

    def keep_old(self, layers: Collection[Any] | None = None) -> None:
        """Give layers what they had."""
        for layer, buffers in zip(self.layers, self._before, strict=True):
            if layers is None or any(layer is other for other in layers):
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)

    def put(self) -> None:
        """Write the averages, of all ranks together, into the layers that have seen a batch."""
        counts = [int(batches) for batches in self._batches]
        everywhere = gather_objects(counts)
        for i, layer in enumerate(self.layers):
            ranks = sum(found[i] > 0 for found in everywhere)
            if ranks == 0:  # training does not run it: a teacher, a network that only validates
                self.keep_old([layer])
                continue
            means = [total / max(counts[i], 1) for total in self._sums[i]]
            mean_over_ranks_(means)
            for target, value in zip((layer.running_mean, layer.running_var), means, strict=True):
                target.copy_(value * (world_size() / ranks))
            layer.num_batches_tracked.fill_(max(found[i] for found in everywhere))


def reestimate(layers: Collection[Any], forward: Callable[[_Step], int]) -> int:
    """Compute the layers' running statistics anew and average them over ranks.

    Args:
        layers: From :func:`tracked_batch_norms`.
        forward: Runs training batches through the model, without gradients and with the layers in
            training mode, each in what it is given; returns the number of batches.

    Returns:
        The number of batches. With 0 of them, or on an error, the statistics are as before; those
        of a layer that has seen none of the batches, too.
    """
    statistics = _Statistics(layers)
    try:
        with statistics.averaging():
            batches = forward(statistics.step)
    except BaseException:
        statistics.keep_old()
        raise
    if batches == 0:
        statistics.keep_old()
    else:
        statistics.put()
    return batches


def reestimate_batchnorm(
    trainer: Trainer,
    module: LightningModule,
    get_loader: Callable[[], Any],
    seen: int,
    at_most: int | None = None,
    *,
    with_hooks: bool = False,
) -> int | None:
    """Compute BatchNorm statistics for the weights in place; every rank calls it.

    Args:
        trainer: The Trainer.
        module: The module.
        get_loader: :meth:`TrainerSwitch.user_training_loader`.
        seen: Batches of an epoch of data without a length.
        at_most: Number of batches; ``None`` means those of an epoch.
        with_hooks: Whether ``on_train_batch_start`` changes batches.

    Returns:
        The number of batches; ``None`` when there was nothing to do, or, with a warning, no way to.
    """
    training = modules_in_training(trainer, module)
    layers = tracked_batch_norms(module, training)
    if not layers:
        return None
    problem: Exception | None = None

    def forward(step: _Step) -> int:
        nonlocal problem
        batches = 0
        try:
            loader = get_loader()
            whole = loader_batches(loader)
            whole = seen if whole is None else whole
            batches = training_steps(
                trainer,
                module,
                loader,
                training,
                whole if at_most is None else min(whole, at_most),
                around=step,
                hooks=batch_hooks(trainer, module) if with_hooks else (),
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
