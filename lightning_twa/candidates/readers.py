"""Weights from checkpoint files: Lightning checkpoints, state dicts, safetensors, candidates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lightning_twa.candidates.candidate import Candidate, is_dense
from lightning_twa.candidates.encoding import decode
from lightning_twa.candidates.find import RANK, WHOLE, check_file, check_name
from lightning_twa.candidates.frozen import FROZEN
from lightning_twa.candidates.inert import load_tensors
from lightning_twa.candidates.reference import SUFFIX
from lightning_twa.candidates.shards import is_index, read_shards
from lightning_twa.subspace import check_finite

__all__ = ["load_checkpoint", "read_candidate_from", "read_file", "without_wrappers"]

_Tensors = Mapping[str, Tensor]
_Names = dict[str, list[str]]  # the model's names to the file's

_KEYS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights
_WRAPPERS = {"_orig_mod", "module"}  # what torch.compile and data parallelism put into names
_PREFIXES = ("model.", "module.", "_orig_mod.")
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"


def read_file(path: Path) -> dict[str, Tensor]:
    """The named tensors of one file, on the CPU, mapped into memory where the format allows it.

    Reads Lightning checkpoints, state dicts, files with the weights under ``model`` or
    ``model_state_dict``, safetensors, and candidates (with what is frozen). No code of Python
    objects is run. What is no tensor, such as extra state, is left out.

    Args:
        path: A file with one of the suffixes .ckpt, .pt, .pth, .bin and .safetensors, or the index
            of several, like ``model.safetensors.index.json``.

    Returns:
        The tensors by their names in the file. Writing to them does not change the file, which must
        not be truncated while they are in use.

    Raises:
        ValueError: Naming the file, and what to do.
    """
    check_file(path)
    if is_index(path):
        return read_shards(path, read_file)
    if path.suffix.lower() == SUFFIX:
        return _read_safetensors(path)
    state = _state_dict(path, _load(path))
    return {name: _plain(path, name, t) for name, t in state.items() if isinstance(t, Tensor)}


def load_checkpoint(path: Path, *, objects: bool = False) -> Any:
    """What ``torch.save`` wrote.

    Args:
        path: The file.
        objects: Whether it may hold Python objects, which are then without values: no code of
            theirs is run.

    Raises:
        ValueError: Naming the file, and what to do.
    """
    check_file(path)
    return _load(path, objects=objects)


def read_candidate_from(path: Path, expected: _Tensors, parameters: Collection[str]) -> Candidate:
    """The weights of a model from a file, whose names may differ by what wrappers put there.

    Parameters that are not floating-point are left out, as in every candidate; the file may lack
    them. A file may hold further names of a tensor (tied weights), but no further tensors.

    Args:
        path: See :func:`read_file`.
        expected: The model's parameters and persistent buffers by name, tied ones once, on any
            device; only their shapes and dtypes are used.
        parameters: Which of the names are parameters.

    Returns:
        The candidate, with the stem of the path as its name, in the order of ``expected``.

    Raises:
        ValueError: Naming the file and the first tensor that is missing, has another shape or
            dtype, is not finite, is unknown to the model, or could be either of two.
    """
    tensors, trained = read_file(path), set(parameters)
    needed = {n: t for n, t in expected.items() if n not in trained or t.is_floating_point()}
    stored = _resolve(path, tensors, expected, needed)
    used = {name: tensors[stored[name][0]] for name in needed}
    if _is_candidate(path):  # StorageConfig(dtype="bfloat16") has rounded it
        used = {n: t.to(needed[n].dtype) if t.is_floating_point() else t for n, t in used.items()}
    wrong = [name for name, tensor in used.items() if tensor.dtype != expected[name].dtype]
    if wrong:
        raise ValueError(
            f"{path} has tensor {wrong[0]!r} in {used[wrong[0]].dtype}, but the model's is in "
            f"{expected[wrong[0]].dtype}{_more(wrong)}. Convert the model, or save the file in its "
            f"dtypes."
        )
    for name, tensor in used.items():
        if name in trained:  # numbers of one byte have no sum
            check_finite(tensor.float() if tensor.itemsize == 1 else tensor, f"{path}: {name!r}")
    dense = {name for name, tensor in tensors.items() if is_dense(tensor)}
    others = dense - {own for names in stored.values() for own in names}
    extra = sorted(o for o in others if not any(_same(tensors[o], t) for t in used.values()))
    if extra:
        raise ValueError(
            f"{path} holds tensor {extra[0]!r}{_more(extra)}, which the model does not have. Give "
            f"a file of this model, or save the state dict of the model alone."
        )
    weights = {name: tensor.contiguous() for name, tensor in used.items() if name in trained}
    buffers = {name: tensor.contiguous() for name, tensor in used.items() if name not in trained}
    return Candidate(path.stem, weights, buffers)


def _load(path: Path, *, objects: bool = True) -> Any:
    begin = _begin(path)
    zipped = begin.startswith(_ZIP)  # files of torch before 1.6 cannot be mapped
    if not zipped and not begin.startswith(_PICKLE):
        raise ValueError(
            f"{path} was not written by torch.save: it begins with {begin[:12]!r}. Give a file of "
            f"torch.save, or one in the safetensors format with the suffix {SUFFIX}."
        )
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many types for damaged files
        # torch wraps the reason in advice on how to load it all the same
        reason = str(error.__context__ or error).split(". Please use")[0] or type(error).__name__
        if "unsupported" in reason.lower():
            if objects:
                return _without_objects(path, zipped, reason)
            raise ValueError(
                f"{path} holds Python objects ({reason}), and only tensors are loaded "
                f"(weights_only=True): if you trust it, load it yourself and save it without them."
            ) from error
        reason = reason.split(". This is an internal")[0]
        raise ValueError(
            f"{path} is damaged or truncated ({reason}). Restore it from a copy, or leave it out."
        ) from error


def _without_objects(path: Path, zipped: bool, reason: str) -> Any:
    """The tensors of a file that holds Python objects, such as hyper-parameters of a class."""
    try:
        return load_tensors(path, mapped=zipped)
    except Exception as error:  # as above
        raise ValueError(
            f"{path} holds Python objects ({reason}), and no tensors could be read beside them "
            f"({type(error).__name__}: {error}). If you trust it, load it yourself and save its "
            f"state_dict alone."
        ) from error


def _begin(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        ValueError: When it has none, or stands for a file elsewhere.
    """
    with open(path, "rb") as file:
        begin = file.read(64)
    if not begin:
        raise ValueError(
            f"{path} is empty: what wrote it was interrupted, or the disk was full. Restore it "
            f"from a copy, or leave it out."
        )
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights. Run 'git lfs pull'.")
    return begin


def _state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    """The part of a file's content that has the weights."""
    parts = {key: content.get(key) for key in _KEYS} if isinstance(content, Mapping) else {}
    keys = [key for key, value in parts.items() if _has_tensors(value)]
    if "state_dict" in keys and "pytorch-lightning_version" in content:
        keys = ["state_dict"]
    if len(keys) > 1:
        raise ValueError(f"{path} holds weights under several keys, {keys}. Save one alone.")
    state: Mapping[str, Any] = content[keys[0]] if keys else content
    if not _has_tensors(state):
        what = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no state dict with tensors, but {what}. Save model.state_dict(), alone "
            f"or under 'state_dict', 'model' or 'model_state_dict'."
        )
    return state


def _has_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(tensor, Tensor) for tensor in value.values())


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter) or tensor.is_meta:
        raise ValueError(
            f"{path}: tensor {name!r} is a {kind.__name__} on {tensor.device}, not a plain tensor "
            f"with all its values. {WHOLE}"
        )
    return tensor.detach()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _begin(path)
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            own = {"candidate", "format_version"} <= metadata.keys()
            tensors = {} if own else {key: file.get_tensor(key) for key in list(file.keys())}
    except Exception as error:  # as in decode
        raise ValueError(
            f"{path} is no safetensors file that can be read ({error}): it is damaged, truncated "
            f"or of another kind. Restore it from a copy, or leave it out."
        ) from error
    check_name(path, metadata.get("candidate", ""))
    # save_model of safetensors keeps one name of tied tensors, and notes the others
    aliases = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors}
    return _read_own(path) if own else {**aliases, **tensors}


def _is_candidate(path: Path) -> bool:
    """Whether this package has written a file that can be read."""
    if path.suffix.lower() != SUFFIX:
        return False
    with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
        return {"candidate", "format_version"} <= (file.metadata() or {}).keys()


def _read_own(path: Path) -> dict[str, Tensor]:
    """A candidate's tensors, joined with what is frozen in all candidates of its directory."""
    folder = path.resolve().parent
    if path.stem == FROZEN or RANK.fullmatch(folder.name):
        raise ValueError(
            f"{path} holds a part of the weights: what is frozen, or one process's part. Give the "
            f"directory of a run without sharded parameters."
        )
    result: dict[str, Tensor] = {}
    for file in (folder / f"{FROZEN}{SUFFIX}", path):
        try:
            candidate = decode(str(file)) if file.is_file() else Candidate(FROZEN, {}, {})
        except ValueError as error:
            raise ValueError(f"{file} {error}") from error
        result |= candidate.tensors
    return result


def _resolve(path: Path, tensors: _Tensors, expected: _Tensors, needed: _Tensors) -> _Names:
    """The file's names of every tensor of the model; several where they hold the same values."""
    result: _Names = {}
    best: _Names = {}
    for view in _views(list(tensors), list(expected)):
        fits = {n: [o for o in view[n] if tensors[o].shape == expected[n].shape] for n in view}
        if all(fits.get(name) for name in needed):
            for name, names in fits.items():
                result[name] = list(dict.fromkeys([*result.get(name, []), *names]))
        best = max(best, view, key=lambda v: len(v.keys() & needed.keys()))
    if not needed.keys() <= result.keys():
        raise ValueError(_misfit(path, tensors, needed, best))
    for name in needed:
        first, *others = result[name]
        for other in others:
            if not _same(tensors[first], tensors[other]):
                raise ValueError(
                    f"{path} is ambiguous: the model's tensor {name!r} could be {first!r} or "
                    f"{other!r}, and they differ. Save one of them alone."
                )
    return result


def _views(stored: list[str], expected: list[str]) -> Iterator[_Names]:
    """Ways to read the file's names as the model's, the first with all names as they are."""
    changes = [("", ""), *((p, "") for p in _PREFIXES), *(("", p) for p in _PREFIXES)]
    for clean in (str, without_wrappers):
        model = {clean(name): name for name in expected}
        if len(model) < len(expected):
            continue  # the model itself has parts of such names
        for removed, added in changes:
            view: _Names = {}
            for own in stored:
                new = added + clean(own).removeprefix(removed)
                if clean(own).startswith(removed) and new in model:
                    view.setdefault(model[new], []).append(own)
            yield view


def without_wrappers(name: str) -> str:
    """A tensor's name without what ``torch.compile`` and data parallelism put into it."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in _WRAPPERS), last])


def _misfit(path: Path, tensors: _Tensors, needed: _Tensors, view: _Names) -> str:
    """What is wrong with the names that fit best."""
    missing = [name for name in needed if name not in view]
    if missing:
        return (
            f"{path} has no tensor {missing[0]!r}{_more(missing)}, which the model has; it holds "
            f"{list(tensors)[:3]}. Give a file of this model, with all its weights."
        )
    shapes = {name: [tuple(tensors[own].shape) for own in view[name]] for name in needed}
    wrong = [name for name in needed if tuple(needed[name].shape) not in shapes[name]]
    return (
        f"{path} has tensor {wrong[0]!r} with shape {shapes[wrong[0]][0]}, but the model's has "
        f"{tuple(needed[wrong[0]].shape)}{_more(wrong)}. Give a file of this model."
    )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
