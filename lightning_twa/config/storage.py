"""Where candidates are kept, what rests in the phase, and what is written for resuming in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from lightning_twa.config.reading import read_fields
from lightning_twa.config.values import check_choice

__all__ = ["StorageConfig"]

STORAGES = ("auto", "memory", "disk")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where candidates are kept, what rests in the phase, and what is written for resuming in it.

    Args:
        kind: ``"memory"``: in main memory, a copy in every process, and in every checkpoint.
            ``"disk"``: a safetensors file each, mapped into memory by the processes of a host;
            checkpoints name the files. ``"auto"``: memory for one process on a host while
            candidates take at most a quarter of what is free; else files.
        dirpath: Directory of the files, the same path on every host; a run has a directory of its
            own in it (``version_0``, ...). ``None`` means ``twa_candidates`` in the Trainer's
            ``default_root_dir``.
        dtype: ``"float32"`` keeps parameters in their own dtype; ``"bfloat16"`` rounds the
            trainable ones, for half the room.
        offload_optimizer: Whether the state of your optimizer, which is not stepped in the phase,
            waits in main memory for its end: with Adam that frees twice the trainable parameters on
            the device. Its tensors are the same objects with the same values on the same device
            afterwards, also after an exception; checkpoints of the phase hold them as ever. Step
            counts stay, and so do states of sharded parameters, with a warning. Not for optimizers
            whose steps are captured in CUDA graphs, which know the addresses.
        cache_subspace: Whether the subspace is written to a file in ``dirpath`` when the phase
            begins, also with candidates in memory. A run that is interrupted in the phase and
            resumed then reads it instead of building it from the candidates: the same weights,
            sooner. It takes as much room as the subspace in memory, for each host that does not see
            the other's files once, and is deleted when the phase is over, unless another run wrote
            it. What cannot be used any more is built again, and a line says so.

    Raises:
        ValueError: When a value is outside its range, or ``dirpath`` goes with ``"memory"`` and
            there is nothing else to write.
    """

    kind: Literal["auto", "memory", "disk"] = "auto"
    dirpath: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload_optimizer: bool = False
    cache_subspace: bool = False

    def __post_init__(self) -> None:
        read_fields(self)
        check_choice("StorageConfig.kind", self.kind, STORAGES)
        check_choice("StorageConfig.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("offload_optimizer", "cache_subspace"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"Invalid StorageConfig.{name}={value!r}. Must be True or False.")
        if self.dirpath is None:
            return
        if not isinstance(self.dirpath, (str, os.PathLike)) or not str(self.dirpath):
            raise ValueError(
                f"Invalid StorageConfig.dirpath={self.dirpath!r}. Must be a directory, or None "
                f"(in the Trainer's default_root_dir)."
            )
        if self.kind == "memory" and not self.cache_subspace:
            raise ValueError(
                f"StorageConfig.dirpath={str(self.dirpath)!r} needs kind='disk' or 'auto', or "
                f"cache_subspace=True, but kind='memory' writes no files."
            )
