"""A candidate: a copy of the weights at one moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_twa.candidates.unchanged import equal
from lightning_twa.machine import (
    from_rank_zero_,
    gather_objects,
    in_common,
    mean_over_ranks_,
    world_size,
)
from lightning_twa.subspace import check_finite, local_part, to_shards

__all__ = [
    "Candidate",
    "agreed_buffers",
    "average_buffers_",
    "check_complete",
    "check_form",
    "check_weights",
    "further_names",
    "is_dense",
    "is_expanded",
    "is_kept",
    "misfit",
    "persistent_buffers",
    "put_buffer",
    "varying",
]


@dataclass(frozen=True)
class Candidate:
    """A copy of the weights at one moment, on the CPU.

    Args:
        name: ``"epoch=3"`` or ``"step=120"``.
        parameters: Name to tensor, tied parameters once.
        buffers: Name to tensor, the buffers that a state dict holds.
    """

    name: str
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a number for each of its elements: no sparse, quantized, nested one."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)


def is_kept(parameter: Tensor) -> bool:
    """Whether candidates have a parameter: a real floating-point one that is dense."""
    return parameter.is_floating_point() and is_dense(parameter)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory (``expand``), so that they cannot be written."""
    return any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; shared ones once. Those that are not dense stay
    the module's own: there is no average of them.
    """
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is None or name in child._non_persistent_buffers_set or id(buffer) in seen:
                continue
            if not is_dense(buffer):
                continue
            seen.add(id(buffer))
            result[f"{prefix}.{name}" if prefix else name] = buffer
    return result


def further_names(module: nn.Module) -> dict[str, str]:
    """Every further name that a state dict has for a tied tensor, with the name that candidates
    have it under.
    """
    own = {**dict(module.named_parameters()), **persistent_buffers(module)}
    names = {id(tensor): name for name, tensor in own.items()}
    everywhere = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {
        name: names[id(tensor)]
        for name, tensor in everywhere.items()
        if id(tensor) in names and name not in own
    }


def check_weights(
    module: nn.Module, name: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Check that the trainable weights are finite; every process calls it.

    Args:
        module: The model.
        name: Name of the candidate that they are to become.
        weights: Values that take the place of the module's.

    Raises:
        ValueError: On every process, naming the tensor that is not finite on one of them.
    """
    to_shards(module)
    with in_common(ValueError):
        for key, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                own = (weights or {}).get(key, parameter)
                if isinstance(own, UninitializedParameter):
                    raise ValueError(
                        f"Candidate {name!r}, tensor {key!r}, has no values: it is of a lazy layer "
                        f"that no batch has gone through. Run one before training, or leave the "
                        f"layer out."
                    )
                check_finite(local_part(own), f"Candidate {name!r}, tensor {key!r},")


@torch.no_grad()
def agreed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's persistent buffers, the same on every process: means of floating-point ones
    (running statistics differ), rank 0's values of the others. Those that have another shape on
    another process are left out.

    Returns:
        Name to tensor: copies on the CPU, and on another device the module's own or a copy there.
    """
    own = _common_buffers(module)
    if world_size() > 1:
        return _agreed(own)
    whole = torch.contiguous_format
    return {
        name: local_part(buffer).clone(memory_format=whole) if buffer.is_cpu else local_part(buffer)
        for name, buffer in own.items()
    }


@torch.no_grad()
def average_buffers_(module: nn.Module) -> None:
    """Replace the floating-point buffers by their means over all processes, where they have the
    same shape on all; every process calls it.
    """
    own = {n: b for n, b in _common_buffers(module).items() if b.is_floating_point()}
    for name, value in _agreed(own).items():
        put_buffer(module, name, value)


def _agreed(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies, equal on every process."""
    result: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        value = local_part(buffer).clone(memory_format=torch.contiguous_format)
        if value.is_floating_point():
            wide = value.float() if value.itemsize == 1 else value  # float8 has no sum
            mean_over_ranks_([wide])
            value = wide.to(value.dtype)
        else:
            from_rank_zero_([value])
        result[name] = value
    return result


@torch.no_grad()
def put_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a buffer; one whose elements share memory (``expand``) gets memory of its own.

    Args:
        module: The model.
        name: Of the buffer.
        value: Of its shape.
    """
    owner_name, _, own_name = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    buffer = owner._buffers[own_name]
    assert buffer is not None
    target = local_part(buffer)
    if not is_expanded(target):
        target.copy_(value)
    elif not torch.equal(target, value.to(target)):
        owner._buffers[own_name] = value.to(target).contiguous().clone()


def _common_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers whose shape and dtype are the same on all processes."""
    own = persistent_buffers(module)
    if world_size() == 1:
        return own
    forms = gather_objects({n: (tuple(b.shape), b.dtype) for n, b in own.items()})
    return {n: b for n, b in own.items() if all(n in f and f[n] == forms[0][n] for f in forms)}


def misfit(candidate: Candidate, module: nn.Module, left_out: Collection[str] = ()) -> str | None:
    """What a candidate lacks of the parameters of a module, in a sentence.

    Args:
        candidate: The candidate.
        module: The model.
        left_out: Names of parameters that are as in the module.
    """
    for name, parameter in module.named_parameters():
        if name in left_out or not is_kept(parameter):
            continue
        held = candidate.parameters.get(name)
        if held is None:
            return f"Candidate {candidate.name!r} has no tensor {name!r}, which the model has."
        shape = local_part(parameter).shape
        if held.shape != shape:
            return (
                f"Candidate {candidate.name!r} has tensor {name!r} of shape {tuple(held.shape)}, "
                f"but the model's has {tuple(shape)}."
            )
    return None


def check_form(module: nn.Module, previous: Candidate, moment: str) -> None:
    """Check that a module has the parameters that it had, for a candidate that can be averaged.

    Args:
        module: The model.
        previous: The candidate taken before, or given.
        moment: What is due now, for the error.

    Raises:
        ValueError: Naming the parameter that has come, gone or changed its shape.
    """
    to_shards(module)
    now = {n: local_part(p) for n, p in module.named_parameters() if is_kept(p)}
    forms = [
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (previous.parameters, now)
    ]
    for name in {**forms[0], **forms[1]}:
        before, after = (f"shape {form[name]}" if name in form else "none" for form in forms)
        if before != after:
            raise ValueError(
                f"Parameter {name!r} has changed its form in the run: {before} in candidate "
                f"{previous.name!r}, {after} {moment}. Weights of different forms cannot be "
                f"averaged. Collect from where the model has its last form "
                f"(CollectConfig(start=...)), or make all its parameters before."
            )


def check_complete(candidates: Iterable[Candidate], module: nn.Module) -> None:
    """Check that every candidate has all parameters of a module that could be averaged. A buffer
    that one lacks keeps the module's value.

    Raises:
        ValueError: Naming the candidate and the tensor that it lacks.
    """
    parameters = {n for n, p in module.named_parameters() if is_kept(p)}
    for candidate in candidates:
        lacking = parameters - set(candidate.parameters)
        if lacking:
            raise ValueError(
                f"Candidate {candidate.name!r} has no tensor {min(lacking)!r}, which the model "
                f"has. It is damaged, or of another model: resume from a checkpoint of this "
                f"one."
            )


def depends_on_values(candidates: Iterable[Candidate], also: Collection[str]) -> bool:
    """Whether :func:`varying` has to compare values: of a parameter that is not in ``also``, and
    that candidates do not share.
    """
    first, *others = candidates
    return any(
        name not in also and any(c.parameters[name] is not tensor for c in others)
        for name, tensor in first.parameters.items()
    )


def varying(candidates: Iterable[Candidate], also: Collection[str] = ()) -> set[str]:
    """Names of the parameters that differ between candidates, and of those in ``also``; every
    process calls it.
    """
    first, *others = candidates
    differ = {
        name
        for name, tensor in first.parameters.items()
        if name in also
        or any(
            c.parameters[name] is not tensor and not equal(c.parameters[name], tensor)
            for c in others
        )
    }
    return set().union(*gather_objects(differ))
