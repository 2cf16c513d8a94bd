"""Candidates into a model: averages of them in its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_twa.candidates.candidate import Candidate, persistent_buffers
from lightning_twa.subspace import TensorSpec, local_part, to_shards

__all__ = [
    "copy_into",
    "mean_buffers",
    "mean_parameters",
    "put_average",
    "put_back",
    "put_weighted",
    "weights_and_buffers",
]


def mean_buffers(
    candidates: Iterable[Candidate], module_buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Uniform average of the floating-point buffers; the newest candidate's value of the others.

    Summed in float64, so that a buffer that is the same in every candidate stays as it is. One that
    has come, gone or changed its shape in the run is not in the result: the module has its newest
    value.

    Args:
        candidates: One at least.
        module_buffers: The persistent buffers of the module that gets the result.
    """
    members = list(candidates)
    result: dict[str, Tensor] = {}
    for name, own in module_buffers.items():
        held = [c.buffers[name] for c in members if name in c.buffers]
        if len(held) == len(members) and all(tensor.shape == own.shape for tensor in held):
            newest = held[-1]
            averaged = newest.is_floating_point()
            result[name] = _mean(held).to(newest.dtype) if averaged else newest
    return result


def mean_parameters(candidates: Iterable[Candidate]) -> Iterator[tuple[str, Tensor]]:
    """Uniform average of the parameters, one float64 tensor at a time."""
    members = list(candidates)
    for name in members[-1].parameters:
        yield name, _mean([c.parameters[name] for c in members])


def _mean(values: list[Tensor]) -> Tensor:
    total = values[0].double()
    for value in values[1:]:
        total = total + value
    return total / len(values)


def put_average(module: nn.Module, candidates: Iterable[Candidate]) -> None:
    """Write the uniform average of candidates into a module, one tensor after another."""
    members = list(candidates)
    state, buffers = weights_and_buffers(module), persistent_buffers(module)
    for name, value in mean_parameters(members):
        copy_into(state, {name: value})
    copy_into(state, mean_buffers(members, buffers))


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
    named = dict(module.named_parameters())
    for spec in specs:
        total: Tensor | None = None
        for weight, candidate in zip(weights[:, spec.block].tolist(), members, strict=True):
            if weight != 0:
                term = weight * candidate.parameters[spec.name].double()
                total = term if total is None else total.add_(term)
        assert total is not None, "averaging weights sum to 1"
        copy_into({spec.name: local_part(named[spec.name])}, {spec.name: total})


def weights_and_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by name, of sharded ones this process's part;
    they share the module's memory.
    """
    to_shards(module)
    named = {**dict(module.named_parameters()), **persistent_buffers(module)}
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
    copy_into(now, {n: copies[n] for n in same_form})
    for name in copies.keys() - same_form - dict(module.named_parameters()).keys():
        owner, _, own_name = name.rpartition(".")
        module.get_submodule(owner)._buffers[own_name] = copies[name].clone()


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each value into the target of its name."""
    for name, value in values.items():
        targets[name].copy_(value)
