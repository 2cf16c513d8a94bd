"""Weighted sums of state dicts, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_twa.average.members import Member, State
from lightning_twa.candidates import fit_singular_vectors_, is_dense, total_weight
from lightning_twa.subspace import in_float64

__all__ = ["mix", "model_stock"]


class _Sum:
    """A weighted sum of candidates that have the same tensors. What is the same in all of them
    stays as it is where the factors sum to 1, whatever their rounding.
    """

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.first: State = {}
        self.total: dict[str, Tensor] = {}  # of differences from the first
        self.newest: State = {}
        self._name = ""

    def add(self, member: Member, factor: float) -> None:
        """Add a candidate.

        Raises:
            ValueError: When its names, shapes or dtypes are others than the first one's.
        """
        state = member.tensors()
        if not self.factors:
            self._name, self.first = member.name, state
        else:
            _check_alike(member.name, state, self._name, self.newest)
            for key, tensor in state.items():
                if _is_averaged(tensor):
                    part = factor * (_wide(tensor) - _wide(self.first[key]))
                    self.total[key] = self.total[key] + part if key in self.total else part
        self.factors.append(factor)
        self.newest = state

    def result(self) -> State:
        """The sum, in the candidates' dtypes; of what has none the newest."""
        share = total_weight(self.factors)
        result = {
            key: (share * _wide(self.first[key]) + self.total.get(key, 0.0))
            .to(tensor.dtype)
            .to(tensor.device)
            if _is_averaged(tensor)
            else tensor.detach().clone()
            for key, tensor in self.newest.items()
        }
        fit_singular_vectors_(
            result, self.newest, [key for key, part in self.total.items() if part.any()]
        )
        return result


def _is_averaged(tensor: Tensor) -> bool:
    return is_dense(tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _wide(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    return whole.to(torch.complex128) if tensor.is_complex() else in_float64(whole)


def _check_alike(name: str, state: State, first: str, other: State) -> None:
    for key in [*state, *other]:
        if key not in state or key not in other:
            has, lacks = (name, first) if key in state else (first, name)
            raise ValueError(f"{has} has tensor {key!r}, but {lacks} has not. Average one model's.")
        a, b = state[key], other[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"{name}: tensor {key!r} is {tuple(a.shape)}, {a.dtype}, but in {first} it is "
                f"{tuple(b.shape)}, {b.dtype}. Average one model's."
            )


def mix(members: Sequence[Member], factors: Sequence[float]) -> State:
    """The sum of members, each times its factor."""
    total = _Sum()
    for member, factor in zip(members, factors, strict=True):
        total.add(member, factor)
    return total.result()


def model_stock(members: Sequence[Member], start: Member) -> State:
    """Each tensor goes from the anchor to the mean of the members as far as
    ``t = n cos / (1 + (n - 1) cos)``, with the mean cosine of the angles between members as seen
    from the anchor.
    """
    if len(members) < 2:
        raise ValueError(
            f"average(method='model_stock') measures angles between models: it needs two or more, "
            f"but there is {len(members)}."
        )
    origin, states = start.tensors(), [member.tensors() for member in members]
    for member, state in zip(members, states, strict=True):
        _check_alike(member.name, state, f"The anchor ({start.name})", origin)
    result = dict(mix(members, [1 / len(members)] * len(members)))
    for key, tensor in origin.items():
        if not _is_averaged(tensor) or not tensor.numel():
            continue
        base = _wide(tensor)
        ways = torch.stack([(_wide(state[key]) - base).reshape(-1) for state in states])
        lengths = ways.norm(dim=1, keepdim=True)
        units = ways / lengths.masked_fill(lengths == 0, 1.0)
        n = len(states)
        cosine = float((units.sum(dim=0).norm() ** 2 - units.norm() ** 2).real / (n * (n - 1)))
        share = max(n * cosine / (1 + (n - 1) * cosine), 0.0) if cosine > -1 / (n - 1) else 0.0
        moved = base + share * ways.mean(dim=0).view(base.shape)
        result[key] = moved.to(tensor.dtype).to(tensor.device)
    return result
