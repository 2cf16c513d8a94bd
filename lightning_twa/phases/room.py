"""Whether a run will have the room that it needs, said before it trains: directories for files, and
memory for candidates and directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import Parameter, is_lazy

from lightning_twa.candidates import averaged_names, is_kept, persistent_buffers
from lightning_twa.config import Settings, SubspaceConfig
from lightning_twa.machine import (
    free_bytes,
    in_common,
    rank,
    total_bytes,
    warn,
    why_not_writable,
    world_size,
)
from lightning_twa.subspace import ParameterLayout, cut_evenly, held_locally, stored_bytes
from lightning_twa.trainer import has_time_limit, is_ddp, max_epochs, shards_parameters
from lightning_twa.words import count, size

__all__ = ["check_directories", "check_memory"]

CPU = torch.device("cpu")


def check_directories(settings: Settings, trainer: Trainer, root: Path) -> None:
    """Try the directories that will be written to for sure; every process calls it.

    Args:
        settings: The arguments of the callback.
        trainer: In ``setup``.
        root: Directory of the candidates' files.

    Raises:
        ValueError: Naming the path, and what to set instead.
    """
    shards, kind = shards_parameters(trainer), settings.storage.kind
    to_disk = kind == "disk" or (kind == "auto" and (trainer.num_devices > 1 or shards))
    cached = settings.storage.cache_subspace and not settings.uniform
    with in_common(ValueError):
        if cached and not to_disk and rank() == 0:
            reason = why_not_writable(root)
            if reason is not None:
                raise ValueError(
                    f"StorageConfig(cache_subspace=True) writes to {root}, which cannot be written "
                    f"({reason}). Set StorageConfig.dirpath to a directory that can, or "
                    f"cache_subspace=False."
                )
        if to_disk and (shards or rank() == 0):
            reason = why_not_writable(root)
            if reason is not None:
                raise ValueError(
                    f"The candidates of this run go to files in {root}, which cannot be written "
                    f"({reason}). Set StorageConfig.dirpath to a directory that can"
                    + ("." if shards else ", or StorageConfig(kind='memory').")
                )
        if not isinstance(settings.save_average, bool) and rank() == 0:
            _check_save_average(settings.save_average, shards)


def _check_save_average(name: str | os.PathLike[str], shards: bool) -> None:
    path = Path(name)
    if str(name).endswith(os.sep) or (path.is_dir() and not shards):
        raise ValueError(
            f"save_average={str(name)!r} is a directory. Name a file in it, such as "
            f"{str(path / 'twa.ckpt')!r}."
        )
    reason = why_not_writable(path.parent)
    if reason is not None:
        raise ValueError(
            f"save_average={str(name)!r} cannot be written ({reason}). Name a file in a directory "
            f"that can be written, or use save_average=True, beside the checkpoints."
        )


def check_memory(
    settings: Settings, trainer: Trainer, module: LightningModule, snapshots: int, others: int
) -> None:
    """Refuse what will not fit into all the memory that there is, and warn of what does not fit
    into what is free; every process calls it.

    Args:
        settings: The arguments of the callback.
        trainer: At the start of training.
        module: The model.
        snapshots: How many will have been taken when the phase begins.
        others: Candidates from files and running averages.

    Raises:
        ValueError: With what is needed, what there is, and settings that would fit.
    """
    warning = None
    with in_common(ValueError):
        if settings.storage.kind == "memory":
            _check_candidates(settings, trainer, module, snapshots, others)
        need = None if settings.uniform else _need(settings, trainer, module, snapshots, others)
        if need is not None:
            warning = need.check()
    if warning is not None:
        warn(warning)


def _check_candidates(
    settings: Settings, trainer: Trainer, module: LightningModule, snapshots: int, others: int
) -> None:
    there = total_bytes(CPU, processes=trainer.num_devices)
    buffers = sum(b.nbytes for b in persistent_buffers(module).values())
    floats = [p for p in module.parameters() if is_kept(p) and not is_lazy(p)]
    frozen = sum(p.nbytes for p in floats if not p.requires_grad)

    def needed(n: int, dtype: str = settings.storage.dtype) -> int:
        sizes = (p.numel() * min(p.itemsize, 2 if dtype == "bfloat16" else 8) for p in floats)
        return frozen + n * (buffers + sum(sizes) - (frozen if dtype == "float32" else 0))

    n, mean = snapshots + others, _mean_in_main_memory(settings, trainer, floats)
    if there is None or needed(n) + mean <= there:
        return
    fitting = ["StorageConfig(kind='auto') (files)"]
    small = needed(n, "bfloat16") + mean
    if settings.storage.dtype == "float32" and small <= there:
        fitting.append(f"StorageConfig(dtype='bfloat16') ({size(small)})")
    most = _most(lambda m: needed(m + others) + mean <= there, 2, snapshots)
    if most is not None:
        taken = needed(most + others) + mean
        fitting.append(f"CollectConfig(max_candidates={most}) ({size(taken)})")
    what = "and the mean that becomes the next (dense=True) " if mean else ""
    raise ValueError(
        f"{count(n, 'candidate')} of this model {what}take {size(needed(n) + mean)} of main memory "
        f"in each "
        f"process (StorageConfig.kind='memory'), which has {size(there)}. What would fit: "
        f"{', '.join(fitting)}."
    )


def _mean_in_main_memory(settings: Settings, trainer: Trainer, floats: list[Parameter]) -> int:
    """Bytes of the mean over the steps since the newest candidate, where it is kept there."""
    device = settings.collect.ema_device or trainer.strategy.root_device
    if not settings.collect.dense or torch.device(device).type != "cpu":
        return 0
    return sum(p.numel() * max(p.itemsize, 4) for p in floats if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class _Need:
    """What the phase will keep on a device, in one process.

    Args:
        settings: The arguments of the callback.
        layout: Of the columns held here.
        shard: The same if processes shared all columns; ``None`` where they do, or cannot.
        device: Where center and directions are kept.
        processes: That share main memory.
        snapshots: See :func:`check_memory`.
        others: See :func:`check_memory`.
        endless: Whether the length of the phase is not known.
    """

    settings: Settings
    layout: ParameterLayout
    shard: ParameterLayout | None
    device: torch.device
    processes: int
    snapshots: int
    others: int
    endless: bool

    def bytes(
        self,
        config: SubspaceConfig | None = None,
        snapshots: int | None = None,
        layout: ParameterLayout | None = None,
    ) -> int:
        """With other settings where they are given: center and directions, of which the centered
        candidates have one less than there are.
        """
        config, layout = config or self.settings.subspace, layout or self.layout
        n = (self.snapshots if snapshots is None else snapshots) + self.others
        held = min(n, config.group_size or n)
        directions = max(held - (config.basis == "pca"), 1)
        k = min(directions, config.rank or directions)
        return stored_bytes(layout, k, config.bits) + layout.numel * layout.dtype.itemsize

    def check(self) -> str | None:
        """Returns a warning, where there is room, but not free.

        Raises:
            ValueError: Where there is none.
        """
        there = total_bytes(self.device, self.processes)
        free = free_bytes(self.device, self.processes)
        if there is None or free is None or self.bytes() <= min(there, free):
            return None
        fitting = ", ".join(self._fitting(min(there, free)))
        remedy = f"What would fit: {fitting}." if fitting else "No single setting makes it fit."
        what = (
            f"The directions of {count(self.snapshots + self.others, 'candidate')} and their "
            f"center take {size(self.bytes())} on {self.device}"
        )
        if self.bytes() > there:
            raise ValueError(f"{what}, which has {size(there)}. {remedy}")
        return (
            f"{what} when the phase begins, but only {size(free)} of {size(there)} are free there "
            f"now. If it fails the run ends with the uniform average. {remedy}"
        )

    def _fitting(self, room: int) -> Iterator[str]:
        """Single settings with which it fits into so many bytes."""
        config = self.settings.subspace
        n, grouped = self.snapshots + self.others, config.group_size is not None

        def needs(**changes: object) -> int:
            return self.bytes(replace(config, **changes))  # type: ignore[arg-type]

        for bits in (16, 8, 4, 2, 1):
            if bits < config.bits and needs(bits=bits) <= room:
                yield f"SubspaceConfig(bits={bits}) ({size(needs(bits=bits))})"
                break
        if config.parametrization == "free":
            most = _most(lambda m: needs(group_size=m) <= room, 2, config.group_size or n)
            if most is not None and not self.endless:
                yield f"SubspaceConfig(group_size={most}) ({size(needs(group_size=most))})"
            if config.basis == "pca":
                most = _most(lambda m: needs(rank=m) <= room, 1, config.rank or n)
                if most is not None:
                    yield f"SubspaceConfig(rank={most}) ({size(needs(rank=most))})"
        least = max(2, (config.mask_size or 0) + 1 - self.others)
        most = _most(lambda m: self.bytes(snapshots=m) <= room, least, self.snapshots)
        if most is not None and not grouped:
            yield f"CollectConfig(max_candidates={most}) ({size(self.bytes(snapshots=most))})"
        if self.shard is not None and self.bytes(layout=self.shard) <= room:
            yield f"distribute='shard' ({size(self.bytes(layout=self.shard))})"
        main = min(total_bytes(CPU, self.processes) or 0, free_bytes(CPU, self.processes) or 0)
        if self.device.type != "cpu" and self.bytes() <= main:
            yield f"SubspaceConfig(device='cpu') ({size(self.bytes())} of main memory)"


def _most(fits: Callable[[int], bool], least: int, below: int) -> int | None:
    """The largest number below a limit that fits."""
    return next((m for m in range(below - 1, least - 1, -1) if fits(m)), None)


def _need(
    settings: Settings, trainer: Trainer, module: LightningModule, snapshots: int, others: int
) -> _Need | None:
    """What the phase will keep at least; ``None`` where nothing is trained yet."""
    averaged = averaged_names(module, settings.collect)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held_by_user = {id(p) for group in groups for p in group["params"]}
    trained = {
        name: p
        for name, p in module.named_parameters()
        if (averaged is None or name in averaged)
        and p.requires_grad
        and id(p) in held_by_user
        and is_kept(p)
        and not is_lazy(p)
    }
    if not any(p.numel() for p in trained.values()):
        return None
    config, processes = settings.subspace, world_size()
    layout, shard = ParameterLayout.from_tensors(trained, config.blocks), None
    if shards_parameters(trainer):
        layout = held_locally(layout, trained, rank()).local
    elif processes > 1 and is_ddp(trainer) and settings.distribute != "replicate":
        layout = cut_evenly(layout, processes)[rank()].local  # what "auto" does where room is short
    elif processes > 1 and is_ddp(trainer):
        shard = cut_evenly(layout, processes)[rank()].local
    if layout.numel == 0:
        return None
    device = trainer.strategy.root_device if config.device is None else torch.device(config.device)
    return _Need(
        settings=settings,
        layout=layout,
        shard=shard,
        device=device,
        processes=trainer.num_devices,
        snapshots=snapshots,
        others=others,
        endless=trainer.max_steps == -1
        and max_epochs(trainer) is None
        and not has_time_limit(trainer),
    )
