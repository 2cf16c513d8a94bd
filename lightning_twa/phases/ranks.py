"""How the processes of a run share the phase: decided at the switch, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_twa.config import Settings
from lightning_twa.machine import all_ranks, free_bytes, rank, world_size
from lightning_twa.subspace import (
    Columns,
    Exchange,
    LocalShards,
    OneProcess,
    ParameterLayout,
    Replicate,
    Shard,
    cut_evenly,
    held_everywhere,
    held_locally,
    stored_bytes,
)
from lightning_twa.trainer import callbacks, is_ddp, overrides, scales_loss, shards_parameters

__all__ = ["Sharing", "decide"]

COMFORTABLE = 0.5  # of the free memory that a basis may take without being sharded
GRADIENT_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "configure_gradient_clipping",
)


@dataclass(frozen=True)
class Sharing:
    """What a run with several processes does in the phase.

    Args:
        columns: What each process holds.
        exchange: How a step is taken.
        gradients_stay: Whether DDP's own exchange of gradients and buffers is to be stopped.
        text: What the user is told.
    """

    columns: Columns
    exchange: Exchange
    gradients_stay: bool
    text: str | None


def decide(
    settings: Settings,
    trainer: Trainer,
    module: LightningModule,
    parameters: Mapping[str, Tensor],
    num_candidates: int,
) -> Sharing:
    """Choose what the strategy, the settings and the free memory allow.

    Args:
        settings: The arguments of the callback.
        trainer: At the switch.
        module: The model.
        parameters: Name to parameter, those that the subspace spans.
        num_candidates: ``n``.
    """
    device = trainer.strategy.root_device
    config, processes = settings.subspace, world_size()
    whole = ParameterLayout.from_tensors(parameters, config.blocks)
    if shards_parameters(trainer):
        columns = held_locally(whole, parameters, rank())
        text = (
            f"TWA: each of {processes} processes holds the directions of its own shards; a step "
            f"sums the coefficient gradients."
        )
        return Sharing(columns, LocalShards(columns, device=device), False, text)
    columns = held_everywhere(whole, rank(), processes)
    if processes == 1 or not is_ddp(trainer):
        return Sharing(columns, OneProcess(), False, None)

    reason = _needs_true_gradient(trainer, module)
    k = min(num_candidates, config.rank or num_candidates)
    needed = stored_bytes(whole, k, config.bits) + whole.numel * whole.dtype.itemsize
    kind, why = settings.distribute, ""
    if kind == "auto":
        place = torch.device(config.device) if config.device is not None else device
        # Processes on one host share its memory.
        free = free_bytes(place, processes=trainer.num_devices)
        fits = free is None or needed <= COMFORTABLE * free
        kind = "replicate" if all_ranks(fits, device) else "shard"
        if kind == "shard":
            why = ", because all of them do not fit into half of the free memory"
    size = f"{needed / 2**20:.1f} MiB"
    gradients = (
        "gradients stay in their process"
        if reason is None
        else f"DDP averages gradients as in training, because {reason}"
    )
    if kind == "replicate":
        text = f"TWA: each of {processes} processes holds all directions ({size}); {gradients}."
        exchange: Exchange = OneProcess() if reason else Replicate(device)
    else:
        every = cut_evenly(whole, processes)
        columns = every[rank()]
        text = (
            f"TWA: each of {processes} processes holds the directions of its own columns (a share "
            f"of {size}){why}; a step gathers the weights, and "
            f"{gradients if reason else 'averages gradients where their columns are'}."
        )
        exchange = Shard(every, averaged=reason is not None, device=device)
    return Sharing(columns, exchange, reason is None, text)


def _needs_true_gradient(trainer: Trainer, module: LightningModule) -> str | None:
    """Why DDP must go on averaging gradients in the phase, ``None`` where it need not.

    Whoever looks at a gradient before the optimizer's step must see the average.
    """
    model = trainer.strategy.model
    if trainer.gradient_clip_val:
        return "gradients are clipped"
    if scales_loss(trainer):
        return "the loss scaler looks for overflow in them"
    if getattr(model, "static_graph", False):
        return "the graph is static"
    owners: list[LightningModule | Callback] = [module, *callbacks(trainer)]
    for owner in owners:
        for name in GRADIENT_HOOKS:
            if overrides(owner, name):
                return f"{type(owner).__name__}.{name}() may look at them"
    return None
