"""A device that there is not, with streams. Its tensors have values, in main memory; mixing them
with the host's fails as on a real one. What a real one may do late is done as late as it can be,
and what races with that is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers.counting import FREE

DEVICE = torch.device("cuda", 0)
COPIES = {"copy_", "_foreach_copy_"}
ACROSS = {*COPIES, "_to_copy"}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}


class Race(AssertionError):
    """What a real device might do differently each time."""


class There(Tensor):
    """A tensor on the device."""

    held: Tensor
    written: int  # when, by the operations of the main stream

    @staticmethod
    def __new__(cls, held: Tensor, written: int = 0) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        made.held, made.written = held, written
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: Any) -> None:
        """Its memory is given back when the stream has done what it was asked for."""
        for work in stream.queue:
            if work.source() is self:
                work.kept = self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{function} of a simulated device, which is not there any more")


class Stream:
    """Does what it is asked for when somebody waits for it; the main one does it at once."""

    def __init__(self, device: Any = None, *, simulated: Simulated | None = None) -> None:
        self.main = simulated is not None
        self.simulated = simulated or Simulated.current
        self.queue: list[_Late] = []
        self.behind = 0  # what the main stream had done when this one has waited for it

    def wait_stream(self, other: Stream) -> None:
        other.synchronize() if self.main else None
        self.behind = self.simulated.done

    def wait_event(self, event: Event) -> None:
        if self.main:
            event.synchronize()
        else:
            self.behind = max(self.behind, event.moment)

    def record_event(self, event: Any = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Event:
    """What a stream has been asked for until then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.moment = 0
        self.left: list[_Late] = []
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Simulated.current.stream
        self.moment = Simulated.current.done
        self.left = list(self.stream.queue)

    def query(self) -> bool:
        return not any(work in self.stream.queue for work in self.left) if self.stream else True

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Simulated.current.stream).wait_event(self)

    def synchronize(self) -> None:
        assert self.stream is not None
        Simulated.current.waits += 1
        Simulated.current.events += 1
        Simulated.current.check_sources(self.moment)
        for work in self.left:
            while work in self.stream.queue:
                self.stream.queue.pop(0)()


class Simulated:
    """The device; while it is entered its tensors can be made.

    Attributes:
        done: Operations of the main stream, without those that start no kernel.
        waits: How often the host has waited for the device.
        events: How often for an event alone.
        down: Elements that were copied to the host.
    """

    current: Simulated

    def __init__(self) -> None:
        self.done = self.waits = self.events = self.down = 0
        self.main = Stream(simulated=self)
        self.stream = self.main
        self.pinned: set[int] = set()
        self.sources: list[tuple[int, Tensor, Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Simulated:
        Simulated.current = self
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self._within)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 33, 1 << 34))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *args: Any) -> None:
        self._stack.close()
        self.check_sources(self.done)

    @contextmanager
    def _within(self, stream: Stream | None) -> Iterator[None]:
        before, self.stream = self.stream, stream or self.main
        try:
            yield
        finally:
            self.stream = before

    def wait(self) -> None:
        """The host waits for the current stream."""
        self.waits += 1
        self.stream.synchronize()
        self.check_sources(self.done)

    def check_sources(self, until: int) -> None:
        """What the device was to take from the host must not have changed until then."""
        due = [pair for moment, *pair in self.sources if moment <= until]
        self.sources = [kept for kept in self.sources if kept[0] > until]
        if not all(torch.equal(source, before) for source, before in due):
            raise Race("memory was used again before the device had taken what was in it")

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned


class _Functions(TorchFunctionMode):
    """Pinned memory, and moves in other terms: a torch without CUDA has no guard for devices."""

    def __init__(self, simulated: Simulated) -> None:
        super().__init__()
        self.simulated = simulated

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            made = function(*args, **kwargs)
            self.simulated.pinned.add(made.untyped_storage().data_ptr())
            return made
        if function is Tensor.tolist and args[0].is_cuda:
            return args[0].cpu().tolist()
        if function is Tensor.pin_memory:
            made = args[0].clone()
            self.simulated.pinned.add(made.untyped_storage().data_ptr())
            return made
        if function is Tensor.is_pinned:
            return self.simulated.is_pinned(args[0])
        if function is Tensor.to:
            plain = {k: v for k, v in kwargs.items() if k not in ("copy", "non_blocking")}
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **plain)
            if device is not None and device.type == DEVICE.type:
                return self._move(args[0], dtype or args[0].dtype, kwargs)
        elif _is_there(kwargs.get("device")):
            made = function(*args, **{**kwargs, "device": "cpu"})
            self.simulated.done += 1
            return There(made, self.simulated.done)
        return function(*args, **kwargs)

    def _move(self, tensor: Tensor, dtype: torch.dtype, kwargs: dict[str, Any]) -> Tensor:
        if tensor.is_cuda and dtype == tensor.dtype and not kwargs.get("copy"):
            return tensor
        made = There(torch.empty(tensor.shape, dtype=dtype), self.simulated.done)
        return made.copy_(tensor, non_blocking=kwargs.get("non_blocking", False))


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


class _Dispatch(TorchDispatchMode):
    """The operations."""

    def __init__(self, simulated: Simulated) -> None:
        super().__init__()
        self.simulated = simulated

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = function.__name__.partition(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in given if isinstance(t, There)]
        here = [t for t in given if not isinstance(t, There) and t.dim() > 0]
        if there and here and name not in ACROSS:
            raise RuntimeError(f"{function}: tensors of the device and of the host")
        wanted = kwargs.get("device")
        on = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if name in COPIES:
            targets, sources = args[:2]
            late = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            for target, source in zip(tree_leaves(targets), tree_leaves(sources), strict=True):
                self._copy(target, source, late)
            return targets if isinstance(targets, Tensor) else None
        if there and (name in READS or (name == "_to_copy" and not on)):
            self.simulated.wait()
            self.simulated.down += sum(t.numel() for t in there) * (name == "_to_copy")
        if there and not self.simulated.stream.main:
            raise Race(f"{function} of a stream beside the main one: only copies are simulated")
        back = {id(t.held): t for t in there}
        plain = tree_map(lambda t: t.held if isinstance(t, There) else t, (args, kwargs))
        result = function(*plain[0], **plain[1])
        self.simulated.done += on and name not in FREE

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or not on:
                return value
            found = back.get(id(value))
            if found is None:
                return There(value, self.simulated.done)
            found.written = self.simulated.done
            return found

        return tree_map(wrap, result)

    def _copy(self, target: Tensor, source: Tensor, late: bool) -> None:
        simulated, stream = self.simulated, self.simulated.stream
        if isinstance(target, There):
            assert stream.main, "only copies to the host are simulated beside the main stream"
            simulated.done += 1
            target.written = simulated.done
            if isinstance(source, There):
                target.held.copy_(source.held)
            else:
                if late and simulated.is_pinned(source):
                    simulated.sources.append((simulated.done, source, source.clone()))
                else:
                    simulated.waits += 1
                target.held.copy_(source)
        elif not isinstance(source, There):
            target.copy_(source)
        elif not (late and simulated.is_pinned(target)):
            simulated.wait()
            simulated.down += source.numel()
            target.copy_(source.held)
        else:
            simulated.down += source.numel()
            if not stream.main and source.written > stream.behind:
                raise Race("a stream reads what may not have been written yet")
            value = source.held.clone() if stream.main else None
            if target.is_floating_point():
                target.fill_(torch.nan)  # until it is there
            stream.queue.append(_Late(target, weakref.ref(source), value))


class _Late:
    """A copy to the host that a stream will make."""

    def __init__(self, target: Tensor, source: Any, value: Tensor | None) -> None:
        self.target, self.source, self.value = target, source, value
        self.kept: There | None = None

    def __call__(self) -> None:
        source = self.source()
        if self.value is None and source is None:
            raise Race("memory was given back before a stream had read it")
        with torch._C._DisableTorchDispatch():
            self.target.copy_(source.held if self.value is None else self.value)
