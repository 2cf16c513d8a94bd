"""Candidates in main memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.subspace.layout import check_finite

__all__ = ["Candidate", "MemoryStore", "persistent_buffers", "take"]


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


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; shared ones once."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is None or name in child._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            result[f"{prefix}.{name}" if prefix else name] = buffer
    return result


@torch.no_grad()
def take(module: nn.Module, name: str, previous: Candidate | None = None) -> Candidate:
    """Copy a module's weights to the CPU.

    A frozen parameter that is as in ``previous`` shares its memory, so that fine-tuning a few
    adapters keeps one copy of the backbone.

    Args:
        module: The model.
        name: Name of the candidate.
        previous: The candidate taken before.

    Raises:
        ValueError: Naming the tensor, when a trainable weight is not finite.
    """
    parameters: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        old = None if previous is None else previous.parameters.get(key)
        if old is not None and not parameter.requires_grad and _same(old, parameter):
            parameters[key] = old
            continue
        copy = _to_cpu(parameter)
        if parameter.requires_grad:
            check_finite(copy, f"Candidate {name!r}, tensor {key!r},")
        parameters[key] = copy
    buffers = {key: _to_cpu(buffer) for key, buffer in persistent_buffers(module).items()}
    return Candidate(name, parameters, buffers)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)


def _same(old: Tensor, new: Tensor) -> bool:
    return (
        old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new.detach().cpu())
    )


class MemoryStore:
    """A window of candidates in main memory, oldest first.

    Args:
        max_candidates: The newest so many are kept; ``None`` keeps all.
    """

    def __init__(self, max_candidates: int | None = None) -> None:
        self.max_candidates = max_candidates
        self._candidates: list[Candidate] = []

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    @property
    def names(self) -> list[str]:
        """Names of the candidates, oldest first."""
        return [candidate.name for candidate in self._candidates]

    @property
    def nbytes(self) -> int:
        """Bytes held; shared tensors count once."""
        tensors = {
            t.data_ptr(): t.nbytes
            for c in self._candidates
            for t in (*c.parameters.values(), *c.buffers.values())
        }
        return sum(tensors.values())

    def add(self, module: nn.Module, name: str) -> None:
        """Keep the module's weights as the newest candidate; see :func:`take`."""
        previous = self._candidates[-1] if self._candidates else None
        self._candidates.append(take(module, name, previous))
        if self.max_candidates is not None:
            del self._candidates[: -self.max_candidates]

    def varying(self, also: Collection[str] = ()) -> list[str]:
        """Names of the parameters that differ between candidates, and of those in ``also``."""
        first = self._candidates[0].parameters
        return [
            name
            for name, tensor in first.items()
            if name in also
            or any(
                c.parameters[name] is not tensor and not torch.equal(c.parameters[name], tensor)
                for c in self._candidates[1:]
            )
        ]

    def mean_buffers(self) -> dict[str, Tensor]:
        """Uniform average of the floating-point buffers; the newest candidate's value of the
        others.

        Summed in float64, so that a buffer that is the same in every candidate stays as it is.
        """
        result = {}
        for name, newest in self._candidates[-1].buffers.items():
            if newest.is_floating_point():
                total = sum(c.buffers[name].double() for c in self._candidates)
                assert isinstance(total, Tensor)
                result[name] = (total / len(self._candidates)).to(newest.dtype)
            else:
                result[name] = newest
        return result

    def mean_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Uniform average of the parameters, one tensor at a time."""
        for name, newest in self._candidates[-1].parameters.items():
            total = sum(c.parameters[name].double() for c in self._candidates)
            assert isinstance(total, Tensor)
            yield name, (total / len(self._candidates)).to(newest.dtype)

    def state_dict(self) -> list[dict[str, Any]]:
        """Names and tensors of the candidates, oldest first."""
        return [
            {"name": c.name, "parameters": dict(c.parameters), "buffers": dict(c.buffers)}
            for c in self._candidates
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Replace the candidates by those of :meth:`state_dict`."""
        self._candidates = [Candidate(s["name"], s["parameters"], s["buffers"]) for s in state]
        if self.max_candidates is not None:
            del self._candidates[: -self.max_candidates]
