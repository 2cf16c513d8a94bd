"""What is averaged: a callback's candidates, files, or state dicts, read when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_twa.candidates import (
    Candidate,
    find_files,
    is_dense,
    read_file,
    unique_names,
    without_wrappers,
)
from lightning_twa.checkpoint import warn_of_averages
from lightning_twa.config import check_patterns, is_selected, matches
from lightning_twa.results import RunResults
from lightning_twa.subspace import check_finite

__all__ = ["Member", "Paths", "State", "members_of"]

State = dict[str, Tensor]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Member:
    """A candidate that is read when it is needed."""

    def __init__(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        self.name = name
        self._read = read

    def tensors(self) -> State:
        """Its tensors, all finite."""
        state = {k: t for k, t in self._read().items() if isinstance(t, Tensor)}
        for key, tensor in state.items():
            if tensor.is_floating_point() and is_dense(tensor):
                wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no sum
                check_finite(wide, f"{self.name}, tensor {key!r},")
        return state


class Selected:
    """Which tensors are averaged; the others are those of the newest candidate, in all of them.

    Args:
        newest: The newest candidate.
        include: Patterns of names; ``None`` for all.
        exclude: Patterns of names that are not, also where ``include`` matches.

    Raises:
        ValueError: Naming a pattern that is of no tensor.
    """

    def __init__(
        self, newest: Member, include: tuple[str, ...] | None, exclude: tuple[str, ...]
    ) -> None:
        check_patterns("include", include, "all")
        check_patterns("exclude", exclude)
        tied: dict[Any, set[str]] = {}
        held = newest.tensors()
        for name, tensor in held.items():
            tied.setdefault(_place(name, tensor), set()).update({name, without_wrappers(name)})
        for option, patterns in (("include", include or ()), ("exclude", exclude)):
            for pattern in patterns:
                if not any(matches(n, pattern) for names in tied.values() for n in names):
                    raise ValueError(
                        f"{option}={pattern!r} is the name of no tensor: {newest.name} has "
                        f"{', '.join(list(held)[:4])}{', ...' if len(held) > 4 else ''}."
                    )
        self.rest = {
            name: tensor
            for name, tensor in held.items()
            if not is_selected(tied[_place(name, tensor)], include, exclude)
        }
        if len(self.rest) == len(held):
            raise ValueError(
                f"include={include!r}, exclude={exclude!r} leave no tensor to average."
            )
        self._names = held.keys() - self.rest.keys()
        self._patterns = (include, exclude)

    def of(self, member: Member) -> Member:
        """The member with the newest one's values of what is not averaged."""

        def read() -> State:
            own = member.tensors()
            rest = {
                n
                for n in own
                if n not in self._names
                and (n in self.rest or not is_selected({n, without_wrappers(n)}, *self._patterns))
            }
            return {**{n: t for n, t in own.items() if n not in rest}, **self.rest}

        return Member(member.name, read)


def _place(name: str, tensor: Tensor) -> Any:
    """The same for tied tensors."""
    if not (is_dense(tensor) and tensor.numel()):
        return name
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def members_of(candidates: Any) -> list[Member]:
    if isinstance(candidates, RunResults):
        further = candidates.further_names
        members = [
            Member(
                f"Candidate {candidate.name!r}",
                lambda c=candidate: _state_dict(c, further),  # type: ignore[misc]
            )
            for candidate in candidates.candidates
        ]
        if not members:
            raise ValueError(
                "The callback has no candidates: it has not run, or it was restored or copied "
                "after its end, when checkpoints and copies do not hold them any more. Average "
                "files instead."
            )
        return members
    several = isinstance(candidates, Sequence) and not isinstance(candidates, str)
    if several and candidates and all(isinstance(c, Mapping) for c in candidates):
        return [
            Member(f"Candidate {i}", lambda c=c: c)  # type: ignore[misc]
            for i, c in enumerate(candidates)
        ]
    paths = find_files(candidates)
    warn_of_averages(paths)
    return [
        Member(name, lambda p=path: read_file(p))  # type: ignore[misc]
        for path, name in zip(paths, unique_names(paths), strict=True)
    ]


def _state_dict(candidate: Candidate, further: Mapping[str, str]) -> State:
    state = candidate.tensors
    return {**state, **{name: state[own] for name, own in further.items() if own in state}}
