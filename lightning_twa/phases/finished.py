"""The finished average, wherever the model goes from there: its file, its values, and whether the
model still holds it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_twa.candidates import (
    is_dense,
    load_checkpoint,
    same,
    weights_and_buffers,
    without_wrappers,
)
from lightning_twa.machine import gather_objects, in_common, rank, say, warn
from lightning_twa.trainer import (
    best_paths,
    checkpoint_directory,
    last_files,
    wait_for_files,
    write_checkpoint,
)
from lightning_twa.words import count

__all__ = ["FinishedAverage"]

NAME = "twa"


class FinishedAverage:
    """What a run ended with.

    Attributes:
        path: The checkpoint that holds it; ``None`` where none was written.
        validated: Whether a validation has seen it; ``None`` if it is not this ``fit``'s.
    """

    def __init__(self) -> None:
        self.path: str | None = None
        self.validated: bool | None = None
        self._digests: dict[str, bytes] = {}  # by name, of this process's part
        self._state: dict[str, Tensor] | None = None  # what the file, if there is one, lacks of it
        self._in_file = False
        self._base = Path()  # of relative names
        self._left: dict[str, bytes] = {}  # digests of what was left to it
        self._warned = False

    def keep_directory(self) -> None:
        """Before training: a relative name of a file means this directory, whatever comes."""
        self._base = Path.cwd()

    def take(self, module: LightningModule) -> None:
        """Remember what the model holds now.

        Args:
            module: With the finished average in it.
        """
        self._warned = self._in_file = self.validated = False
        self._digests = {n: _digest(t) for n, t in weights_and_buffers(module).items()}
        self._state = {
            name: value.detach().to("cpu", copy=True)
            for name, value in _tensors(module.state_dict()).items()
        }

    def write(
        self, trainer: Trainer, where: str | os.PathLike[str] | bool, states: Mapping[str, Any]
    ) -> None:
        """Write what the model holds to a file; every process calls it. A failure is a warning.

        Args:
            trainer: The Trainer.
            where: ``True``: beside the checkpoints, where there are any; else the file's name.
            states: Of callbacks, as in every checkpoint.
        """
        target = _target(trainer, where, self._base)
        if target is None:
            _tell_of_no_file(where)
            return
        own = None if self.path is None else Path(self.path)  # of an earlier cycle
        try:
            with in_common(OSError):
                if rank() == 0:
                    target.parent.mkdir(parents=True, exist_ok=True)
            path = write_checkpoint(
                trainer,
                _temporary(target),
                lambda written: self._publish(written, target, own),
                weights_only=True,
                further={"callbacks": dict(states)},
            )
        except Exception as error:  # of any kind: a run must not end with an error for its file
            self.path = None  # what is there is of an earlier cycle
            warn(
                f"The average could not be written to {target} ({type(error).__name__}: {error}). "
                f"It is in the model, and in average_state_dict() of the callback: save it before "
                f"other weights are loaded, or set save_average to a file that can be written."
            )
            return
        self.path = gather_objects(None if path is None else str(path))[0]
        if self.path is not None and Path(self.path).is_file():  # no directory of shards, seen here
            self._leave_to_file(Path(self.path))
        say(f"TWA: the average is in {self.path}.")

    def _leave_to_file(self, path: Path) -> None:
        """Keep only what the file does not have as it is: ``on_save_checkpoint`` may filter it."""
        own = self._state or {}
        try:
            held = _held_in(path)
        except Exception:  # of a format that is not torch's, by a plugin: everything stays here
            return
        kept = {n: v for n, v in own.items() if not _is_whole_in(held.get(n), v)}
        self._left = {n: _digest(held[n]) for n in own.keys() - kept.keys()}
        self._state, self._in_file = kept, True

    def restore(self, checkpoint: Mapping[str, Any], module: nn.Module) -> None:
        """Take it from the checkpoint of a finished run.

        Args:
            checkpoint: Of the Trainer.
            module: That has loaded it; has what the checkpoint leaves out.
        """
        held = _tensors(checkpoint.get("state_dict", {}))  # a sharded one has it in files
        own = _tensors(module.state_dict())
        rest = {n: v.detach().to("cpu", copy=True) for n, v in own.items() if n not in held}
        self._state, self._in_file = {**rest, **held}, False

    def state_dict(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Parameters and buffers on the CPU, of a sharded model this process's part.

        Args:
            module: Whose names they are to have, where they differ by what ``torch.compile`` or
                data parallelism put into them; ``None``: those of the module that was trained.

        Raises:
            ValueError: When there is no finished average, or naming the tensor that it lacks.
        """
        state = self._state
        if state is not None and self._in_file:
            state = {**self._held(), **state}
        if state is None:
            raise ValueError(
                "There is no finished average: the phase has not ended. Call this after fit(), or "
                "after fit() with the checkpoint of a finished run."
            )
        values = {n: v.detach().clone() for n, v in state.items()}
        return values if module is None else _named_as(module, values)

    def _held(self) -> dict[str, Tensor]:
        """What was left to the file.

        Raises:
            ValueError: When it holds another average by now, as of a later run.
        """
        held = _held_in(Path(str(self.path)))
        others = [n for n, d in self._left.items() if n not in held or _digest(held[n]) != d]
        if others:
            raise ValueError(
                f"{self.path} does not hold the average of this run any more: {len(others)} "
                f"tensors are others (the first is {others[0]!r}). Something has written another "
                f"file of that name since. Restore it from a copy."
            )
        return held

    def compare(self, module: LightningModule, doing: str) -> None:
        """Warn, once, where a model does not hold the average.

        Args:
            module: The model.
            doing: What is about to be done with it, for the warning.
        """
        if not self._digests or self._warned:
            return
        others = self._others_in(module)
        weights = [name for name in others if name in dict(module.named_parameters())]
        if others and not weights:
            self._warned = True
            say(
                f"TWA: {doing[0].lower()}{doing[1:]} the model has the weights of the average, but "
                f"{count(len(others), 'buffer')} with other values than when it was finished (the "
                f"first is {others[0]!r}), as a module that updates them in validation has."
            )
        elif others:
            self._warned = True
            warn(
                f"{doing} the model does not hold the average that TWACallback finished: "
                f"{len(others)} of {len(self._digests)} tensors are others (the first is "
                f"{weights[0]!r}). Something has loaded or swapped other weights since (the best "
                f"checkpoint, an average of another callback). The average is in "
                f"{self.path or 'memory'}: load_state_dict(callback.average_state_dict(), "
                f"strict=False)"
                + ("." if self.path is None else ", or ckpt_path=callback.average_path.")
            )

    def _others_in(self, module: LightningModule) -> list[str]:
        """Names of the tensors that are others than the average's."""
        now = weights_and_buffers(module)
        return [n for n, d in self._digests.items() if n not in now or _digest(now[n]) != d]

    def bring_files_up_to_date(self, trainer: Trainer, module: LightningModule, key: str) -> None:
        """Write the last checkpoint again where it was written at the last step of the run, before
        the average was complete; every process calls it. A failure is a warning.

        Args:
            trainer: At the end of training.
            module: Nothing is written where it does not hold the average any more.
            key: Of the callback's state in a checkpoint.
        """
        if not all(gather_objects(bool(self._digests) and not self._others_in(module))):
            return
        wait_for_files(trainer)
        for path, weights_only in last_files(trainer):
            stale = rank() == 0 and os.path.isfile(path) and self._is_stale(Path(path), key)
            if not gather_objects(stale)[0]:
                continue
            try:
                write_checkpoint(
                    trainer,
                    _temporary(Path(path)),
                    partial(_replace, Path(path)),
                    weights_only=weights_only,
                )
            except Exception as error:  # of any kind: a run must not end with an error for its file
                warn(
                    f"The checkpoint {path} was written before the average was complete, and "
                    f"could not be written again ({type(error).__name__}: {error}). The average "
                    f"is in {self.path or 'the model'}."
                )

    def _is_stale(self, path: Path, key: str) -> bool:
        """Whether a file holds other weights, or the same of a run that has not ended."""
        held = self._is_in(path)
        if not held:
            return held is False
        callbacks = load_checkpoint(path, objects=True).get("callbacks", {})
        return bool(callbacks.get(key, {}).get("phase", "done") != "done")

    def tell_of_best(self, trainer: Trainer) -> None:
        """Say where ``ckpt_path="best"`` and ``"last"`` mean other weights; rank zero looks."""
        if rank() != 0 or not self._digests:
            return
        told: set[Path] = set()
        for name, path in best_paths(trainer):
            if path.is_file() and path not in told and self._is_in(path) is False:
                told.add(path)
                loaders = "trainer.test() without a model, and ckpt_path='best', load them"
                if name != "best_model_path":
                    loaders = "ckpt_path='last' loads them"
                say(
                    f"TWA: {name} ({path}) holds other weights than the average; {loaders}. The "
                    f"average is in {self.path or 'the model alone: set save_average'}."
                )

    def _is_in(self, path: Path, like: Path | None = None) -> bool | None:
        """Whether a file holds the average, in the form that the module's hooks give to what is
        saved; ``None`` where it is of another kind.

        Args:
            path: The file.
            like: One that does.
        """
        if like is None and self._in_file:
            like = Path(str(self.path))
        try:
            held = _held_in(path)
            own = self._state or {} if like is None else _held_in(like)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        both = own.keys() & held.keys()
        return bool(both) and all(_digest(own[n]) == _digest(held[n]) for n in both)

    def _publish(self, temporary: Path, target: Path, own: Path | None) -> Path:
        """Give what was written its name: the own one of an earlier cycle, or one that is free, or
        that of a file with the same average, as a run writes that is resumed and ends again.
        """
        path, k = own if own is not None and own.exists() else target, 0
        while path != own and os.path.lexists(path) and not self._is_in(path, temporary):
            k += 1
            path = target.with_name(f"{target.stem}-v{k}{target.suffix}")
        return _replace(path, temporary)


def _target(trainer: Trainer, where: str | os.PathLike[str] | bool, base: Path) -> Path | None:
    """The file of the average; ``None`` where there is to be none."""
    if where is True:
        directory = checkpoint_directory(trainer)
        directory = gather_objects(directory)[0]  # its name may have a time in it
        return None if directory is None else Path(directory).absolute() / f"{NAME}.ckpt"
    return None if where is False else base / where


def _tell_of_no_file(where: str | os.PathLike[str] | bool) -> None:
    why = "save_average=False"
    if where is not False:
        why = "checkpointing is off; save_average='average.ckpt' would write one"
    say(
        f"TWA: the average is in the model, and in average_state_dict() of the callback; no file "
        f"has it ({why})."
    )


def _temporary(target: Path) -> Path:
    """A name beside a file's, the same on every process, and no other run's."""
    token = gather_objects(secrets.token_hex(6))[0]
    return target.with_name(f".{target.stem[:100]}.{token}.tmp{target.suffix}")


def _replace(target: Path, written: Path) -> Path:
    """Give what was written its name, which the system does not where that is a full directory."""
    old = target.with_name(f".{target.name}.old")
    if target.is_dir():
        os.replace(target, old)
    os.replace(written, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _held_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``state_dict``, mapped."""
    return _tensors(load_checkpoint(path, objects=True).get("state_dict", {}))


def _is_whole_in(held: Tensor | None, own: Tensor) -> bool:
    """Whether a file's tensor is ours, which may be this process's part of it."""
    dense = type(own) is Tensor and is_dense(own)
    return held is not None and (same(held, own) if dense else type(own) is not Tensor)


def _digest(tensor: Tensor) -> bytes:
    """Of dtype, shape and, of a dense one, every bit."""
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    if tensor.numel() and is_dense(tensor):
        plain = tensor.detach().to("cpu").contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().data)
    return found.digest()


def _named_as(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_plain = {without_wrappers(name): value for name, value in values.items()}
    wanted = [n for n, v in module.state_dict().items() if isinstance(v, Tensor)]
    missing = [name for name in wanted if without_wrappers(name) not in by_plain]
    if missing:
        raise ValueError(
            f"The average has no tensor {missing[0]!r}, which this module has. Give the module "
            f"that was trained, or None."
        )
    return {name: by_plain[without_wrappers(name)] for name in wanted}
