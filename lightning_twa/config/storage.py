"""Where candidates are kept."""

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
    """Where candidates are kept.

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

    Raises:
        ValueError: When a value is outside its range, or ``dirpath`` goes with ``"memory"``.
    """

    kind: Literal["auto", "memory", "disk"] = "auto"
    dirpath: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        read_fields(self)
        check_choice("StorageConfig.kind", self.kind, STORAGES)
        check_choice("StorageConfig.dtype", self.dtype, ("float32", "bfloat16"))
        if self.dirpath is None:
            return
        if not isinstance(self.dirpath, (str, os.PathLike)) or not str(self.dirpath):
            raise ValueError(
                f"Invalid StorageConfig.dirpath={self.dirpath!r}. Must be a directory, or None "
                f"(in the Trainer's default_root_dir)."
            )
        if self.kind == "memory":
            raise ValueError(
                f"StorageConfig.dirpath={str(self.dirpath)!r} needs kind='disk' or 'auto', but "
                f"kind='memory' writes no files."
            )
