"""Tensors from a file that holds Python objects too, without any code of these being run."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import SourceChangeWarning

__all__ = ["load_tensors"]

# What rebuilds tensors and their containers; none of them calls what a file names.
_KNOWN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
}


class _Inert:
    """Stands for whatever else a file names: takes everything and does nothing."""

    dump_patches = False  # what torch asks classes of modules in old files for

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        """Nothing of what is given."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        """Nothing."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""

    def add(self, item: Any) -> None:
        """Nothing."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What rebuilds tensors; :class:`_Inert` for everything else."""
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        known = getattr(torch, name, None) if module == "torch" else None
        if isinstance(known, torch.dtype) or (isinstance(known, type) and name.endswith("Storage")):
            return known
        return _Inert


def load_tensors(path: Path, *, mapped: bool) -> Any:
    """What ``torch.save`` wrote, with objects that do nothing in place of Python objects.

    Args:
        path: The file.
        mapped: Map it into memory, which files of the format of torch 1.6 and later allow.

    Raises:
        Exception: Of many types, where the file is damaged.
    """
    reader = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="inert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceChangeWarning)  # of modules in old files
        return torch.load(
            str(path), map_location="cpu", weights_only=False, mmap=mapped, pickle_module=reader
        )


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()
