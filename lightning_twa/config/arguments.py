"""An argument that there is not: whose it is, or which one is meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from lightning_twa.config.collect import CollectConfig
from lightning_twa.config.solver import SolverConfig
from lightning_twa.config.storage import StorageConfig
from lightning_twa.config.subspace import SubspaceConfig

__all__ = ["known_arguments"]

Init = TypeVar("Init", bound=Callable[..., None])
CONFIGS = {
    "collect": CollectConfig,
    "subspace": SubspaceConfig,
    "solver": SolverConfig,
    "storage": StorageConfig,
}


def known_arguments(name: str) -> Callable[[Init], Init]:
    """Of an ``__init__``: raise a ``TypeError`` for an argument that there is not, with what to
    write instead.

    Args:
        name: What a user calls.
    """

    def known(init: Init) -> Init:
        own = [*inspect.signature(init).parameters][1:]
        init.__qualname__ = f"{name}.__init__"  # in Python's own errors

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in own:
                    raise TypeError(f"{name} has no argument {key!r}. {_instead(key, own)}")
            init(self, *args, **kwargs)

        return cast(Init, checked)

    return known


def _instead(key: str, own: Sequence[str]) -> str:
    for argument, config in CONFIGS.items():
        if key in (field.name for field in fields(config)):
            what = config.__name__
            return f"It is one of {what}: pass {argument}={what}({key}=...)."
    near = get_close_matches(key, own, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(own)}."
