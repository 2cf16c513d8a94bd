"""A candidate as the bytes of a safetensors file, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import safetensors.torch
import torch
from torch import Tensor

from lightning_twa.candidates.candidate import Candidate

__all__ = ["decode", "encode"]

_VERSION = "1"
ALIGNMENT = 64  # bytes, of torch's memory on the CPU
_METADATA = "__metadata__"
_PARAMETERS, _BUFFERS = "parameters.", "buffers."
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode(candidate: Candidate) -> Iterator[memoryview]:
    """The bytes of a candidate's file, in pieces: the header, then one tensor after another.

    Args:
        candidate: On the CPU; its tensors may share memory and need not be contiguous.

    Raises:
        TypeError: Naming the tensor whose dtype or layout a file cannot hold.
    """
    # Not safetensors.torch.save or save_file: they hold one to three copies of the whole candidate
    # (0.4.3 to 0.8), refuse shared memory, and forget the order of the tensors, which decides the
    # order of the flat vector. This copies one tensor at a time, and what it yields can be hashed.
    tensors = {_PARAMETERS + name: tensor for name, tensor in candidate.parameters.items()}
    tensors |= {_BUFFERS + name: tensor for name, tensor in candidate.buffers.items()}
    # The format allows no gaps: with the widest dtypes first, every tensor is aligned
    order = sorted(tensors, key=lambda key: -tensors[key].itemsize)
    offsets, stop = {}, 0
    for key in order:
        start, stop = stop, stop + tensors[key].numel() * tensors[key].itemsize
        offsets[key] = [start, stop]
    metadata = {"format": "pt", "format_version": _VERSION, "candidate": candidate.name}
    specs = {
        key: {
            "dtype": _code(key, tensor),
            "shape": list(tensor.shape),
            "data_offsets": offsets[key],
        }
        for key, tensor in tensors.items()
    }
    header = json.dumps({_METADATA: metadata, **specs}).encode()
    header += b" " * (-len(header) % 8)
    largest = max((stop - start, start) for start, stop in offsets.values())[1] if offsets else 0
    # Where torch's own memory begins: a mapped tensor is as fast then, and as exact
    if largest % 8 == 0:
        header += b" " * (-(8 + len(header) + largest) % ALIGNMENT)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for key in order:
        if tensors[key].numel():
            yield _memory(tensors[key].detach())


def decode(path: str) -> Candidate:
    """Map the candidate in a safetensors file into memory, its tensors in their order.

    Args:
        path: A file that will not be truncated while a tensor is in use.

    Raises:
        ValueError: Saying what is wrong with the file, and what to do.
    """
    # safetensors and torch raise many types for a header that somebody forged
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in _ordered_keys(path)}
    except Exception as error:
        raise ValueError(
            f"is not a safetensors file that can be read here ({error}). If another version of "
            f"safetensors or torch wrote it, install that; else restore the file from a copy."
        ) from error
    version = metadata.get("format_version")
    if version != _VERSION:
        raise ValueError(
            f"has format_version {version!r}, but this version of lightning_twa reads "
            f"{_VERSION!r}. Read it with the version of lightning_twa that wrote it."
        )
    strangers = [key for key in tensors if not key.startswith((_PARAMETERS, _BUFFERS))]
    if strangers or "candidate" not in metadata:
        raise ValueError(
            f"was not written by lightning_twa ({strangers[0]!r} is no parameter and no buffer). "
            if strangers
            else "was not written by lightning_twa (it names no candidate). "
            "Restore the file from a copy."
        )
    return Candidate(
        metadata["candidate"], _stripped(tensors, _PARAMETERS), _stripped(tensors, _BUFFERS)
    )


def _code(key: str, tensor: Tensor) -> str:
    """The format's name of a tensor's dtype."""
    dtype = tensor.dtype
    code = _CODES.get(dtype)
    if code is None or tensor.layout != torch.strided or not _known(dtype):
        raise TypeError(
            f"Tensor {key!r} has dtype {dtype} and layout {tensor.layout}, which safetensors "
            f"{safetensors.__version__} cannot store. Keep candidates in memory, or make it a "
            f"non-persistent buffer (complex64 and uint16 need a newer one)."
        )
    return code


@cache
def _known(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors reads a dtype, which depends on its version."""
    spec = {"dtype": _CODES[dtype], "shape": [1], "data_offsets": [0, dtype.itemsize]}
    header = json.dumps({"x": spec}).encode()
    try:
        safetensors.torch.load(len(header).to_bytes(8, "little") + header + bytes(dtype.itemsize))
    except (safetensors.SafetensorError, KeyError):
        return False
    return True


def _memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy when it is contiguous."""
    plain = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    data: memoryview = plain.view(torch.uint8).numpy().data
    return data


def _ordered_keys(path: str) -> list[str]:
    """Names in the order of the header, which safetensors has checked but does not tell."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [key for key in header if key != _METADATA]


def _stripped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
