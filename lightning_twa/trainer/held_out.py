"""Losses on held-out batches, by which weights are compared: forward passes that leave no trace."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_twa.trainer.data import has_length, own_copy, validation_loader
from lightning_twa.trainer.features import has_validation_data, is_a
from lightning_twa.trainer.replay import random_states, random_states_kept, without_traces

__all__ = [
    "batch_losses",
    "batch_size_of",
    "batches_there",
    "draw_batches",
    "hold_back",
    "samples_of_training",
    "training_batch_size",
    "validation_parts",
]

SEED = 34701  # of the choice of samples, which is the same in a run that is resumed
SOME, SMALLEST = 4, 32  # batches, and samples in one, where there are few
ROOM = 1 << 28  # bytes of main memory that the batches may take


def validation_parts(trainer: Trainer) -> list[Any]:
    """The dataloaders of the run's validation, as the Trainer has them now or, before its first
    validation, requested; none without any.
    """
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if trainer.limit_val_batches == 0 or not has_validation_data(trainer):
        return []
    with random_states_kept():
        loaders: Any = validation_loader(trainer) if combined is None else combined
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if is_a(loaders, "CombinedLoader"):
        return list(loaders.flattened)
    if isinstance(loaders, (list, tuple)):
        return list(loaders)
    return [] if loaders is None else [loaders]


def _is_sized(loader: Any) -> bool:
    """Whether samples can be chosen by their index: a ``DataLoader`` that makes batches itself, of
    all samples of a dataset with a length. A sampler of the user's may leave some out: those that
    are trained on.
    """
    return (
        type(loader) is DataLoader
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
    )


def batch_size_of(loader: Any) -> int | None:
    """Samples in a batch, where the loader says so."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def training_batch_size(trainer: Trainer) -> int | None:
    """Samples in a batch of training, where its loader says so."""
    parts = _training_parts(trainer)
    return batch_size_of(parts[0]) if len(parts) == 1 else None


def samples_of_training(trainer: Trainer) -> Any:
    """The loader that is trained on, if there is one, of which samples can be chosen, or ``None``:
    a stream may be read once only.
    """
    parts = _training_parts(trainer)
    return parts[0] if len(parts) == 1 and _is_sized(parts[0]) else None


def _training_parts(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _order(size: int) -> list[int]:
    """All indices in an order that is always the same."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    return torch.randperm(size, generator=generator, device="cpu").tolist()


def _with_samples(loader: Any, indices: Sequence[int], **changes: Any) -> Any:
    """A loader of some of the samples."""
    arguments: dict[str, Any] = {
        "batch_size": min(loader.batch_size, len(indices)),
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    return DataLoader(Subset(loader.dataset, indices), **{**arguments, **changes})


def hold_back(loader: Any, share: float) -> tuple[Any, Any] | None:
    """Divide the samples of a loader at random, the same way always.

    Args:
        loader: A dataloader.
        share: Of the samples that is held back.

    Returns:
        A loader of the others, in order, and one of those held back; ``None`` where samples cannot
        be chosen, or are too few.
    """
    if not _is_sized(loader):
        return None
    size = len(loader.dataset)
    held = int(share * size)
    if held < 2 or size - held < 2:
        return None
    order = _order(size)
    rest = _with_samples(
        loader,
        sorted(order[held:]),
        drop_last=loader.drop_last and size - held > loader.batch_size,
        persistent_workers=loader.persistent_workers,
        generator=loader.generator,
    )
    return rest, _with_samples(loader, sorted(order[:held]))


def draw_batches(loader: Any, at_most: int, rank: int, processes: int) -> list[Any]:
    """Batches to compare weights on, in main memory: of samples that are chosen at random, the same
    always; of a loader that does not allow that, its first ones.

    Args:
        loader: A dataloader.
        at_most: So many batches of this process.
        rank: This process.
        processes: That share the samples, where they can be chosen.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states_kept())
        for restore in random_states(loader):
            stack.callback(restore)
        _seed()
        source = own_copy(loader)
        if _is_sized(loader):
            size = min(at_most * loader.batch_size * processes, len(loader.dataset))
            own = _order(len(loader.dataset))[: size - size % processes][rank::processes]
            if not own:
                return []
            even = _even(len(own), loader.batch_size)
            if len(own) > even and len(own) % even == 1:  # BatchNorm needs two
                own = own[:-1]
            source, at_most = _with_samples(loader, own, batch_size=even), len(own)
        elif isinstance(loader, DataLoader):
            _set_sampler_epoch(loader, 0)  # the Trainer sets it before every epoch of its own
        batches: list[Any] = []
        room = ROOM
        for batch in source:
            batches.append(batch)
            room -= _bytes(batch)
            if len(batches) >= at_most or room <= 0:
                break
        return batches


def batches_there(loader: Any, at_most: int, processes: int) -> int | None:
    """How many batches a loader has for this process, of the size that :func:`draw_batches` makes
    them; ``None`` where it does not know.

    Args:
        loader: A dataloader.
        at_most: As given there.
        processes: That share the samples, where they can be chosen.
    """
    if _is_sized(loader):
        samples = len(loader.dataset) // processes
        even = _even(min(at_most * loader.batch_size, samples), loader.batch_size) if samples else 1
        alone = even > 1 and samples > even and samples % even == 1  # of one sample none is made
        return math.ceil((samples - alone) / even)
    return len(loader) if isinstance(loader, DataLoader) and has_length(loader) else None


def _even(samples: int, most: int) -> int:
    """Samples in a batch, so that all have as many, and there are some to tell chance by."""
    size = min(most, max(math.ceil(samples / SOME), SMALLEST))
    return math.ceil(samples / math.ceil(samples / size))


def _seed() -> None:
    """Begin the same random numbers; the caller keeps those of before."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def _bytes(batch: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(t.nbytes))
    return sum(sizes)


def batch_losses(
    trainer: Trainer,
    module: LightningModule,
    batches: Sequence[Any],
    in_training: Collection[nn.Module],
    hooks: Sequence[Callable[[Any, int], Any]] = (),
    tick: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """The loss of ``training_step`` on each batch, with the weights in place, in evaluation mode.

    Args:
        trainer: The Trainer.
        module: The module.
        batches: From :func:`draw_batches`.
        in_training: The modules that are in training mode all the same: BatchNorm, whose own
            statistics do not fit weights that are only looked at.
        hooks: Called with each batch, on its device, and its index before the step.
        tick: Called with 1 after each batch.

    Returns:
        One number for each batch; not finite where the step has no loss.

    Raises:
        Exception: What the step raises.
    """
    found: list[Tensor] = []
    with without_traces(trainer, module, in_training) as step:
        _seed()  # random transforms are the same for all weights that are compared
        for i, batch in enumerate(batches):
            output = step(_own(batch), i, hooks)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                return [float("nan")] * len(batches)
            found.append(loss.detach())
            tick(1)
    return [float(loss) for loss in found]


def _own(batch: Any) -> Any:
    """A copy: a step may change its batch."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # of a kind that cannot be copied
        return batch
