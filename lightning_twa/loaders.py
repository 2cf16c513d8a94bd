"""Dataloaders as the phase uses them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

__all__ = ["shuffled"]


def shuffled(loader: Any) -> Any:
    """A validation loader as training uses it: in random order, without a last batch of one sample.

    Validation sets are often sorted by class, and a batch of one sample breaks BatchNorm in
    training mode. Anything but a plain ``DataLoader`` in sequential order is returned as it is.
    """
    plain = (
        type(loader) is DataLoader
        and type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) is BatchSampler
    )
    if not plain:
        return loader
    leftover = len(loader.dataset) % loader.batch_size
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last or (leftover == 1 and len(loader.dataset) > 1),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
