"""The data that the coefficients are trained on, where these are not the training data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_twa.config import DATA, Settings
from lightning_twa.trainer import (
    hook_loader,
    is_a,
    is_empty,
    own_copy,
    shares_of_data,
    shuffled,
    validation_loader,
)

__all__ = ["request_loader"]


def request_loader(settings: Settings, trainer: Trainer) -> Any:
    """Get the data of the phase, early, so that what is wrong with it shows before training.

    Returns:
        A dataloader, or ``None`` when the phase uses the training data.

    Raises:
        ValueError: When there is none, or more than one.
    """
    if settings.data == "val":
        loader = validation_loader(trainer)
        if isinstance(loader, (list, tuple, dict)):
            if len(loader) != 1:
                raise ValueError(
                    f"TWACallback(data='val') needs one validation dataloader, but there are "
                    f"{len(loader)}. Return the one to use from a twa_dataloader() hook and pass "
                    f"data='twa'."
                )
            loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
        if loader is None:
            raise ValueError(
                "TWACallback(data='val') trains the coefficients on the validation data, but "
                "val_dataloader() returned None. Return a dataloader, or use data='train'."
            )
        if is_a(loader, "CombinedLoader"):  # validation is using the very object
            raise ValueError(
                "TWACallback(data='val') needs one plain validation dataloader, but there is a "
                "CombinedLoader. Return the loader to use from a twa_dataloader() hook and pass "
                "data='twa'."
            )
        _check_not_empty(settings, loader)
        return shuffled(loader, shares_of_data(trainer))
    if settings.data == "twa":
        loader = hook_loader(trainer, "twa_dataloader")
        if loader is None:
            raise ValueError(
                "TWACallback(data='twa') needs a twa_dataloader() hook on the LightningModule or "
                "LightningDataModule, but neither has one or it returned None. Define it, or use "
                "data='train' or data='val'."
            )
        if is_a(loader, "CombinedLoader") and loader._mode == "sequential":
            raise ValueError(
                "The twa_dataloader() hook returned a CombinedLoader(mode='sequential'), on which "
                "a Trainer cannot train. Use mode='min_size', 'max_size' or 'max_size_cycle'."
            )
        _check_not_empty(settings, loader)
        return own_copy(loader)
    return None


def _check_not_empty(settings: Settings, loader: Any) -> None:
    if is_empty(loader):
        raise ValueError(
            f"TWACallback(data={settings.data!r}) trains the coefficients on {DATA[settings.data]},"
            f" but that dataloader has no batch. Give it data, or a smaller batch_size where "
            f"drop_last=True, or use data='train'."
        )
