"""The data that the coefficients are trained on, where these are not the training data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_twa.config import DATA, Settings
from lightning_twa.trainer import (
    hold_back,
    hook_loader,
    is_a,
    is_empty,
    own_copy,
    shares_of_data,
    shuffled,
    validation_loader,
    validation_parts,
)

__all__ = ["hold_out_loader", "request_loader"]

HELD_BACK = 0.25  # of the data that coefficients are trained on


def request_loader(settings: Settings, trainer: Trainer) -> tuple[Any, Any]:
    """Get the data of the phase, early, so that what is wrong with it shows before training.

    Returns:
        A dataloader, or ``None`` when the phase uses the training data; and one of the samples of
        it that are held back to compare averages on, or ``None``.

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
        rest, held_back = _divided(settings, loader)
        return shuffled(rest, shares_of_data(trainer)), held_back
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
        rest, held_back = _divided(settings, loader)
        if held_back is not None:
            return shuffled(rest, shares_of_data(trainer)), held_back
        return own_copy(loader), None
    return None, None


def _divided(settings: Settings, loader: Any) -> tuple[Any, Any]:
    """What the coefficients are trained on, and what is held back of it where that is due."""
    due = settings.heldout == settings.data or (
        settings.heldout == "auto" and settings.data == "val"
    )
    parts = hold_back(loader, HELD_BACK) if due else None
    return (loader, None) if parts is None else parts


def hold_out_loader(
    settings: Settings, trainer: Trainer, held_back: Any
) -> tuple[Any, str | None, str]:
    """The data that averages are compared on.

    Args:
        settings: The arguments of the callback.
        trainer: In training.
        held_back: See :func:`request_loader`.

    Returns:
        A dataloader or ``None``, what its data are, in words, and why there are none.
    """
    kind = settings.heldout
    if kind is None or settings.uniform:
        return None, None, "heldout=None"
    if held_back is not None:
        return held_back, f"a quarter of {DATA[settings.data]}", ""
    if settings.data == "val" and kind in ("auto", "val"):
        reason = "the coefficients are trained on the validation data, which cannot be divided"
        return None, None, reason
    if kind == "twa":
        loader = None if settings.data == "twa" else hook_loader(trainer, "twa_dataloader")
        reason = "there is no twa_dataloader() hook, or its data cannot be divided"
        return loader, None if loader is None else DATA["twa"], reason
    parts = validation_parts(trainer)
    if len(parts) != 1:
        several = f"there are {len(parts)} validation dataloaders" if parts else "no validation"
        return None, None, several
    if is_empty(parts[0]):
        return None, None, "the validation data are empty"
    return parts[0], DATA["val"], ""


def _check_not_empty(settings: Settings, loader: Any) -> None:
    if is_empty(loader):
        raise ValueError(
            f"TWACallback(data={settings.data!r}) trains the coefficients on {DATA[settings.data]},"
            f" but that dataloader has no batch. Give it data, or a smaller batch_size where "
            f"drop_last=True, or use data='train'."
        )
