"""What a module's ``on_save_checkpoint`` and ``on_load_checkpoint`` make of its state, for states
that Lightning does not know of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.trainer.features import overrides

__all__ = ["LoadHook", "as_saved"]


def as_saved(
    trainer: Trainer, checkpoint: Mapping[str, Any], state: dict[str, Any]
) -> dict[str, Any]:
    """What ``on_save_checkpoint`` of the module would leave of another state of it.

    Args:
        trainer: The Trainer.
        checkpoint: That is being written, before the hook.
        state: Another ``state_dict``.
    """
    module = trainer.lightning_module
    if not overrides(module, "on_save_checkpoint"):
        return state
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    other = {**_structure(rest), "state_dict": dict(state)}
    module.on_save_checkpoint(other)
    edited: dict[str, Any] = other.get("state_dict", {})
    return edited


class LoadHook:
    """Sees what ``on_load_checkpoint`` of a module does to the module's state in a checkpoint, and
    can do the same to others. A copy watches nothing.

    Attributes:
        before: The state in the checkpoint before the hook; ``None`` before a checkpoint was read.
        edits: Whether the hook changed it.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self.edits = False
        self._rest: dict[str, Any] = {}
        self._hook: Callable[[dict[str, Any]], None] | None = None
        self._module: LightningModule | None = None

    def __reduce__(self) -> Any:
        return LoadHook, ()

    def watch(self, module: LightningModule) -> None:
        """Before a checkpoint is read.

        Args:
            module: That it is for.
        """
        self.release()
        if not overrides(module, "on_load_checkpoint"):
            return
        self._module, self._hook = module, module.on_load_checkpoint
        module.on_load_checkpoint = _Watched(self._run, module)  # type: ignore[method-assign]

    def _run(self, checkpoint: dict[str, Any]) -> None:
        assert self._hook is not None
        before = dict(checkpoint.get("state_dict", {}))
        marks = {name: _mark(value) for name, value in before.items()}
        self._rest = _structure({k: v for k, v in checkpoint.items() if k != "state_dict"})
        self._hook(checkpoint)
        self.before, after = before, checkpoint.get("state_dict", {})
        self.edits = marks != {name: _mark(value) for name, value in after.items()}

    def apply(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the hook makes of another state.

        Args:
            state: With the names of the checkpoint; its tensors may be changed.
        """
        if not self.edits:
            return dict(state)
        assert self._hook is not None
        other = {**_structure(self._rest), "state_dict": dict(state)}
        self._hook(other)
        edited: dict[str, Any] = other.get("state_dict", {})
        return edited

    def release(self) -> None:
        """Watch no more, and forget. May be called again."""
        if self._module is not None:
            del self._module.on_load_checkpoint
        self._module = self._hook = self.before = None
        self._rest, self.edits = {}, False


class _Watched:
    """In the place of a module's ``on_load_checkpoint``. A copy of the module has its own again.

    Args:
        run: Called in its stead.
        module: The module.
    """

    def __init__(self, run: Callable[[dict[str, Any]], None], module: LightningModule) -> None:
        self.run, self.module = run, module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Run the hook and see what it does."""
        self.run(checkpoint)

    def __reduce__(self) -> Any:
        return _own_hook, (self.module,)


def _own_hook(module: LightningModule) -> Any:
    return MethodType(type(module).on_load_checkpoint, module)


def _structure(value: Any) -> Any:
    """A copy of nested containers around the same tensors."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, _structure(inner)) for key, inner in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(_structure(inner) for inner in value)
    return copy.deepcopy(value)


def _mark(value: Any) -> Any:
    """What changes when a value is replaced or written to."""
    return (id(value), value._version) if isinstance(value, Tensor) else id(value)
