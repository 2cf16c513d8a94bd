"""What a checkpoint that is being written gets, beside the state of the callback."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.checkpoint import RAW_WEIGHTS
from lightning_twa.phases import saved
from lightning_twa.phases.averaging import Averaging
from lightning_twa.trainer import as_saved, shards_parameters, state_of_module

__all__ = ["bring_up_to_date", "put_validated"]


def put_validated(
    averaging: Averaging, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
) -> None:
    """Give a checkpoint the average that was validated last, or is just being validated, beside the
    weights to go on from. Parts of sharded ones fit into ``state_dict`` alone.
    """
    temporary = averaging.temporary
    weights = temporary.weights_for(module, partial(state_of_module, trainer))
    if weights is None:
        return
    if shards_parameters(trainer):
        checkpoint["state_dict"] = weights
        return
    if temporary.validated is not None and not temporary.in_place:
        checkpoint["state_dict"] = dict(temporary.validated)
    checkpoint[RAW_WEIGHTS] = as_saved(trainer, checkpoint, weights)


def bring_up_to_date(
    averaging: Averaging, trainer: Trainer, checkpoint: dict[str, Any], key: str
) -> None:
    """Give a checkpoint that is being written what has been finished meanwhile."""
    checkpoint["state_dict"] = state_of_module(trainer)
    checkpoint["callbacks"][key] = saved.dump(averaging, "done")
