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
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_twa.machine import all_ranks, gather_objects, mean_over_ranks_, say, warn, world_size
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
    """Averages of the layers' statistics of each batch, in place of what they had. Plain layers
    compute them themselves; of scripted ones, whose momentum cannot be changed, each step gives a
    multiple of its statistics.
    """

    def __init__(self, layers: Collection[Any]) -> None:
        self.layers = list(layers)
        self._before = [
            {name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers
        ]
        self._plain = [layer for layer in layers if isinstance(layer, _BatchNorm)]
        self._scripted = [_Scripted(x) for x in layers if not isinstance(x, _BatchNorm)]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around all steps."""
        momenta = [layer.momentum for layer in self._plain]
        try:
            for layer in self._plain:
                layer.reset_running_stats()
                layer.momentum = None  # torch's sign for a cumulative average
            yield
        finally:
            for layer, momentum in zip(self._plain, momenta, strict=True):
                layer.momentum = momentum

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        for scripted in self._scripted:
            scripted.begin_step()
        yield
        for scripted in self._scripted:
            scripted.end_step()

    def keep_old(self, only: Any = None) -> None:
        """Give the layers, or one of them, what they had."""
        for layer, buffers in zip(self.layers, self._before, strict=True):
            if only is None or layer is only:
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)

    def finish(self) -> None:
        """Make the averages those of all ranks together, in the layers that have seen a batch."""
        for scripted in self._scripted:
            scripted.finish()
        counts = [int(layer.num_batches_tracked) for layer in self.layers]
        everywhere = gather_objects(counts)
        for i, layer in enumerate(self.layers):
            ranks = sum(found[i] > 0 for found in everywhere)
            if ranks == 0:  # training does not run it: a teacher, a network that only validates
                self.keep_old(layer)
                continue
            statistics = (layer.running_mean, layer.running_var)
            if ranks < world_size():
                for value in statistics:
                    value.mul_(world_size() / ranks if counts[i] else 0.0)
            mean_over_ranks_(statistics)
            layer.num_batches_tracked.fill_(max(found[i] for found in everywhere))


class _Scripted:
    """The statistics of a scripted layer, which updates them by its own momentum in every call."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        wide = torch.promote_types(layer.running_mean.dtype, torch.float32)
        self._sums = [
            torch.zeros_like(b, dtype=wide) for b in (layer.running_mean, layer.running_var)
        ]
        self._steps = torch.zeros_like(layer.num_batches_tracked)

    def begin_step(self) -> None:
        """Nothing of the steps before."""
        for buffer in (self.layer.running_mean, self.layer.running_var):
            buffer.zero_()
        self.layer.num_batches_tracked.zero_()

    def end_step(self) -> None:
        """``c`` calls leave ``1 - (1 - momentum)^c`` of a weighted mean of theirs."""
        calls, momentum = self.layer.num_batches_tracked, self.layer.momentum
        share: Tensor | float = 1.0
        if momentum is not None:
            share = 1 - (1 - momentum) ** calls.clamp(min=1).to(self._sums[0].dtype)
        found = (self.layer.running_mean, self.layer.running_var)
        for total, value in zip(self._sums, found, strict=True):
            total.add_(value.to(total.dtype) / share)
        self._steps += calls > 0

    def finish(self) -> None:
        """Write the averages into the layer."""
        steps = self._steps.clamp(min=1)
        self.layer.running_mean.copy_(self._sums[0] / steps)
        self.layer.running_var.copy_(self._sums[1] / steps)
        self.layer.num_batches_tracked.copy_(self._steps)


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
        with statistics.collecting():
            batches = forward(statistics.step)
    except BaseException:
        statistics.keep_old()
        raise
    if batches == 0:
        statistics.keep_old()
    else:
        statistics.finish()
    return batches


def reestimate_batchnorm(
    trainer: Trainer,
    module: LightningModule,
    get_loader: Callable[[], Any],
    seen: int,
    at_most: int | None = None,
    *,
    with_hooks: bool = False,
    matters: bool = True,
) -> int | None:
    """Compute BatchNorm statistics for the weights in place; every rank calls it.

    Args:
        trainer: The Trainer.
        module: The module.
        get_loader: :meth:`TrainerSwitch.user_training_loader`.
        seen: Batches of an epoch of data without a length.
        at_most: Number of batches; ``None`` means those of an epoch.
        with_hooks: Whether ``on_train_batch_start`` changes batches.
        matters: Whether it does where it cannot be done.

    Returns:
        The number of batches; ``None`` when there was nothing to do, or, with a message, no way to.
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
        tell = warn if matters else say
        reason = f"{type(problem).__name__}: {problem}" if problem else "there was no batch"
        tell(
            f"BatchNorm statistics could not be re-estimated for the averaged weights "
            f"({reason}); they are left as training had them. Re-estimate them with "
            f"torch.optim.swa_utils.update_bn before you use the model."
        )
        return None
    return batches
