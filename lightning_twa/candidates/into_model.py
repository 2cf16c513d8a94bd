"""Candidates into a model: averages of them in its parameters and buffers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_twa.candidates.candidate import (
    Candidate,
    is_dense,
    is_expanded,
    persistent_buffers,
    put_buffer,
)
from lightning_twa.candidates.spectral import fit_singular_vectors_
from lightning_twa.subspace import TensorSpec, in_float64, local_part, to_shards

__all__ = [
    "affine_sum",
    "copy_into",
    "mean_buffers",
    "mean_parameters",
    "put_average",
    "put_back",
    "put_weighted",
    "total_weight",
    "weighted",
    "weights_and_buffers",
]

ROUNDING = 2.0**-40  # of a weight, at most


def mean_buffers(
    candidates: Iterable[Candidate], module: nn.Module, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Uniform average of the floating-point buffers; the newest candidate's value of the others.

    One that has come, gone or changed its shape in the run is not in the result: the module has its
    newest value.

    Args:
        candidates: One at least.
        module: That gets the result.
        only: Names of those that are averaged; ``None`` for all.
    """
    members = list(candidates)
    result: dict[str, Tensor] = {}
    for name, own in persistent_buffers(module).items():
        if only is not None and name not in only:
            continue
        held = [c.buffers[name] for c in members if name in c.buffers]
        shape = local_part(own).shape
        if len(held) == len(members) and all(tensor.shape == shape for tensor in held):
            newest = held[-1]
            averaged = newest.is_floating_point()
            result[name] = _mean(held).to(newest.dtype) if averaged else newest
    return result


def mean_parameters(
    candidates: Iterable[Candidate], only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Uniform average of the parameters, or of some, one float64 tensor at a time."""
    members = list(candidates)
    for name in members[-1].parameters:
        if only is not None and name not in only:
            continue
        yield name, _mean([c.parameters[name] for c in members])


def _mean(values: list[Tensor]) -> Tensor:
    return affine_sum(values, [1.0] * len(values), len(values))


def affine_sum(values: Sequence[Tensor], weights: Sequence[float], divisor: int = 1) -> Tensor:
    """``sum_i w_i x_i / d`` in float64 as ``x_0 + sum_i w_i (x_i - x_0) / d``, so that an element
    that is the same in all tensors, an infinity too, stays as it is, whatever the rounding of the
    weights.

    Args:
        values: Of one shape.
        weights: Where they do not sum to ``d``, ``x_0`` is multiplied by their sum.
        divisor: ``d``.
    """
    first = in_float64(values[0])
    total: Tensor | None = None
    for value, weight in zip(values[1:], weights[1:], strict=True):
        if weight != 0:
            wide = in_float64(value)
            term = torch.where(wide == first, 0.0, wide - first).mul_(weight)
            total = term if total is None else total.add_(term)
    share = total_weight(weights, divisor)
    first = first if share == 1 else first * share
    return first if total is None else total.div_(divisor).add_(first)


def total_weight(weights: Sequence[float], divisor: int = 1) -> float:
    """The sum of weights, divided; 1 where it differs from that by rounding only."""
    share = math.fsum(weights) / divisor
    return 1.0 if abs(share - 1) <= len(weights) * ROUNDING else share


def put_average(
    module: nn.Module,
    candidates: Iterable[Candidate],
    only: Collection[str] | None = None,
    means: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write the uniform average of candidates into a module, one tensor after another; singular
    vectors of spectral normalisation that fit it.

    Args:
        module: The model.
        candidates: One at least.
        only: Names of the parameters and buffers that are averaged, where others stay as they are.
        means: Of these parameters, where they are known.
    """
    members = list(candidates)
    changed: list[str] = []
    for name, value in mean_parameters(members, only) if means is None else means:
        copy_into(module, {name: value})
        newest = members[-1].parameters[name]
        if not torch.equal(value.to(newest.dtype), newest):
            changed.append(name)
    copy_into(module, mean_buffers(members, module, only))
    fit_singular_vectors_(weights_and_buffers(module), members[-1].tensors, changed)


def put_weighted(
    module: nn.Module,
    candidates: Iterable[Candidate],
    specs: Iterable[TensorSpec],
    weights: Tensor,
) -> None:
    """Write a weighted average of candidates into a module's parameters, summed in float64.

    Args:
        module: The model.
        candidates: ``n`` of them.
        specs: The parameters to write, and the blocks they belong to.
        weights: ``(n, B)``.
    """
    members = list(candidates)
    for spec in specs:
        values = [candidate.parameters[spec.name] for candidate in members]
        copy_into(module, {spec.name: affine_sum(values, weights[:, spec.block].tolist())})


def weighted(
    candidates: Iterable[Candidate], specs: Iterable[TensorSpec], weights: Tensor
) -> dict[str, Tensor]:
    """A weighted average of candidates by name, on the CPU, in the widest of their dtypes and
    float32; see :func:`put_weighted`.
    """
    members = list(candidates)
    result: dict[str, Tensor] = {}
    for spec in specs:
        values = [candidate.parameters[spec.name] for candidate in members]
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        result[spec.name] = affine_sum(values, weights[:, spec.block].tolist()).to(dtype)
    return result


def weights_and_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by name, of sharded ones this process's part;
    they share the module's memory. Those that are not dense are left out, and
    those of lazy layers that have no values yet.
    """
    to_shards(module)
    parameters = {
        name: p for name, p in module.named_parameters() if is_dense(p) and not is_lazy(p)
    }
    named = {**parameters, **persistent_buffers(module)}
    return {name: local_part(tensor) for name, tensor in named.items()}


@torch.no_grad()
def put_back(module: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Give a module what it had before.

    Args:
        module: The model.
        copies: Of :func:`weights_and_buffers`. A buffer that has gone or changed its shape since is
            registered again; one that has come stays.
    """
    now = weights_and_buffers(module)
    same_form = {n for n, copy in copies.items() if n in now and now[n].shape == copy.shape}
    copy_into(module, {n: copies[n] for n in same_form})
    for name in copies.keys() - same_form - dict(module.named_parameters()).keys():
        owner, _, own_name = name.rpartition(".")
        module.get_submodule(owner)._buffers[own_name] = copies[name].clone()


@torch.no_grad()
def copy_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy each value into the parameter or buffer of its name, of a sharded one into this
    process's part.
    """
    to_shards(module)
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        if name in parameters:
            own = local_part(parameters[name])
            if not is_expanded(own):
                own.copy_(value.to(own.dtype))
            elif not torch.equal(own, value.to(own)):
                parameters[name].data = value.to(own).contiguous().clone()
        else:
            put_buffer(module, name, value)
