"""Dataloaders: the user's, and as the phase uses them."""

from __future__ import annotations

import copy
import math
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_twa.trainer.features import is_a

__all__ = [
    "has_length",
    "hook_loader",
    "is_empty",
    "loader_batches",
    "own_copy",
    "prepare_data",
    "set_epoch",
    "shares_of_data",
    "shuffled",
    "tear_down_fetcher",
    "validation_loader",
]


def validation_loader(trainer: Trainer) -> Any:
    """The user's validation dataloader(s), requested anew."""
    return _request_dataloader(trainer.fit_loop.epoch_loop.val_loop._data_source)


def has_length(loader: Any) -> bool:
    """Whether a loader knows its number of batches."""
    try:
        return sized_len(loader) is not None
    except RuntimeError:  # a CombinedLoader that has not been iterated
        return all(sized_len(part) is not None for part in loader.flattened)


def is_empty(loader: Any) -> bool:
    """Whether a loader is known to have no batch."""
    try:
        return sized_len(loader) == 0
    except RuntimeError:  # a CombinedLoader that has not been iterated
        return False


def hook_loader(trainer: Trainer, name: str) -> Any:
    """What the datamodule's hook ``name``, or else the module's, returns; ``None`` without one."""
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if callable(getattr(owner, name, None)):
            return _request_dataloader(type(trainer.fit_loop._data_source)(owner, name))
    return None


def own_copy(loader: Any) -> Any:
    """A loader with an iterator of its own: the same ``DataLoader`` may be in the middle of an
    epoch elsewhere, and with persistent workers a second iteration would restart the first.

    Args:
        loader: A dataloader or a ``CombinedLoader``; others, and other iterables, are returned as
            they are.
    """
    combined = is_a(loader, "CombinedLoader")  # of either package of Lightning
    if not (combined or isinstance(loader, DataLoader)):
        return loader
    twin: Any = copy.copy(loader)
    twin._iterator = None
    if combined:
        twin.flattened = [own_copy(part) for part in loader.flattened]
    return twin


def shuffled(loader: Any, processes: int = 1) -> Any:
    """A validation loader as training uses it: in random order, without a last batch of one sample.
    What a process gets decides: each has one batch at least.

    Validation sets are often sorted by class, and a batch of one sample breaks BatchNorm in
    training mode. Anything but a plain ``DataLoader`` in sequential order is used as it is.
    """
    plain = (
        type(loader) is DataLoader
        and type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_size is not None  # else the batch sampler is the user's
    )
    if not plain:
        return own_copy(loader)
    own = math.ceil(len(loader.dataset) / processes)
    leftover = own % loader.batch_size
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=own > loader.batch_size and (loader.drop_last or leftover == 1),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def shares_of_data(trainer: Trainer) -> int:
    """Into how many parts Lightning divides a dataset among processes."""
    connector: Any = trainer._accelerator_connector
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    if not connector.use_distributed_sampler or kwargs is None:
        return 1
    return int(kwargs["num_replicas"])


def loader_batches(combined_loader: Any) -> int | None:
    """Batches of a prepared loader in an epoch, limits included; ``None`` without a length."""
    limits = combined_loader.limits
    if limits is None or any(math.isinf(limit) for limit in limits):
        return None
    return int(max(limits))


def prepare_data(trainer: Trainer) -> None:
    """Prepare the user's training data anew for the epoch that begins."""
    loop = trainer.fit_loop
    loop._combined_loader = None
    loop.setup_data()
    set_epoch(loop._combined_loader, trainer.current_epoch)


def set_epoch(combined_loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by the epoch which one it is."""
    for dataloader in combined_loader.flattened:
        _set_sampler_epoch(dataloader, epoch)


def tear_down_fetcher(trainer: Trainer) -> None:
    """Let go of an iterator over the training data that may have begun."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.teardown()
        trainer.fit_loop._data_fetcher = None
