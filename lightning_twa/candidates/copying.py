"""Copies of many tensors in main memory, in few operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from lightning_twa.machine import unreserved_bytes

__all__ = ["HostCopies", "copies_on_host", "to_cpu", "to_host"]

unflatten: Any = _unflatten_dense_tensors  # views of a piece, as DDP makes them
PLAIN = (Tensor, nn.Parameter)
LARGE = 2**16  # elements of a tensor that has memory of its own
PINNING = {"cuda"}  # devices that copy into pinned memory without the host
ROOM = 0.5  # of what nobody has reserved on a device, that copies may take there


def to_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the CPU, in another dtype if one is given."""
    return tensor.detach().to(
        device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )


class HostCopies:
    """Contiguous copies of tensors on the CPU, small ones of one dtype in one piece of memory. They
    are begun where this is made: whatever happens to the tensors afterwards does not change them.

    Args:
        tensors: Dense ones.
        dtypes: What each is rounded to.
        look: Of how many, the first ones, to find out if all are finite.
        stay: Whether the copies stay for long: they are then not in pinned memory.
        aside: Whether a device goes on meanwhile: it copies within its own memory, where there is
            room for that, and a stream of its own sends that to the host.

    Attributes:
        copies: The copies; those of devices that copy without the host have no values before
            :meth:`finish`.
    """

    @torch.no_grad()
    def __init__(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        *,
        look: int = 0,
        stay: bool = True,
        aside: bool = False,
    ) -> None:
        self.copies: list[Tensor] = list(tensors)
        self._look = look
        self._stay = stay
        self._sums: list[Tensor] = []
        self._pieces: list[tuple[Tensor, list[int]]] = []  # in pinned memory
        self._wait: list[Callable[[], object]] = []
        sent: dict[torch.device, list[list[int]]] = {}
        for device, members in self._grouped(tensors, dtypes):
            if device.type in PINNING:
                sent.setdefault(device, []).append(members)
            else:
                piece = self._piece(tensors, dtypes, members, pinned=False)
                torch._foreach_copy_(self._parts(piece, members), [tensors[i] for i in members])
                self._look_at(piece, members)  # while it is in the cache
        for device, groups in sent.items():
            self._send(tensors, dtypes, device, groups, aside=aside)

    def _grouped(
        self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> Iterator[tuple[torch.device, list[int]]]:
        """Indices of tensors that become one piece, with their device; others are copied here."""
        small: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
        for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
            if not tensor.numel():
                self.copies[i] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            elif type(tensor) not in PLAIN:
                self.copies[i] = to_cpu(tensor, dtype)
                self._look_at(self.copies[i], [i])
            elif tensor.numel() >= LARGE:
                yield tensor.device, [i]
            else:  # a device is slow to hash
                small.setdefault((dtype, tensor.device, i < self._look), []).append(i)
        for (_, device, _), members in small.items():
            yield device, members

    def _look_at(self, piece: Tensor, members: list[int]) -> None:
        if members[0] < self._look:
            self._sums.append(_sum(piece))

    def _piece(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        members: list[int],
        *,
        pinned: bool,
    ) -> Tensor:
        size, dtype = sum(tensors[i].numel() for i in members), dtypes[members[0]]
        piece = _pinned(size, dtype) if pinned else torch.empty(size, dtype=dtype, device="cpu")
        for i, part in zip(members, unflatten(piece, [tensors[i] for i in members]), strict=True):
            self.copies[i] = part
        return piece

    def _parts(self, piece: Tensor, members: list[int]) -> list[Tensor]:
        parts: list[Tensor] = unflatten(piece, [self.copies[i] for i in members])
        return parts

    def _send(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        groups: Sequence[list[int]],
        *,
        aside: bool,
    ) -> None:
        stream = beside = torch.cuda.current_stream(device)
        size = sum(tensors[i].numel() * dtypes[i].itemsize for members in groups for i in members)
        room = aside and size <= ROOM * unreserved_bytes(device)
        if room:
            beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for members in groups:
            piece = self._piece(tensors, dtypes, members, pinned=True)
            self._pieces.append((piece, members))
            held = [tensors[i] for i in members]
            there = _empty(piece, device) if room else None
            if there is None:
                room = False
                torch._foreach_copy_(self._parts(piece, members), held, non_blocking=True)
                continue
            torch._foreach_copy_(self._parts(there, members), held)
            beside.wait_stream(stream)
            with torch.cuda.stream(beside):
                piece.copy_(there, non_blocking=True)
            there.record_stream(beside)  # it is given back when that has been done
        if not aside:
            self._wait.append(stream.synchronize)
            return
        # An event is of what has been asked for until now, and not of the steps that follow
        for each in {beside, stream}:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(each)
            self._wait.append(event.synchronize)

    def finish(self) -> bool:
        """Wait until all copies have their values.

        Returns:
            Whether all are finite: ``False`` also where their sum overflows, and where that was not
            asked for.
        """
        for wait in self._wait:
            wait()
        self._wait = []
        for piece, members in self._pieces if self._stay else ():
            for i, part in zip(members, self._parts(piece.clone(), members), strict=True):
                self.copies[i] = part
        for piece, members in self._pieces:
            self._look_at(piece, members)
        self._pieces = []
        return self._look > 0 and all(math.isfinite(value.item()) for value in self._sums)


def to_host(
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    *,
    look: bool = False,
    stay: bool = True,
) -> tuple[list[Tensor], bool]:
    """Copies as in :class:`HostCopies`, and whether all are finite. A device is waited for once,
    and not for every tensor.
    """
    held = HostCopies(tensors, dtypes, look=len(tensors) if look else 0, stay=stay)
    finite = held.finish()
    return held.copies, finite


def _empty(like: Tensor, device: torch.device) -> Tensor | None:
    """Memory on a device; ``None`` where it has none in one piece."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    except torch.cuda.OutOfMemoryError:
        return None


def _pinned(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that a device can write to, or any other where the system has no more of it."""
    try:
        return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=dtype, device="cpu")


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory for a short time, by name: nothing more is on the device for them."""
    copies, _ = to_host([*tensors.values()], [t.dtype for t in tensors.values()], stay=False)
    return dict(zip(tensors, copies, strict=True))


def _sum(piece: Tensor) -> Tensor:
    """Which is not finite where something is not."""
    if not piece.is_floating_point():
        return torch.zeros(())
    wide = piece.float() if piece.itemsize == 1 else piece
    return wide.sum(dtype=torch.float32 if wide.itemsize == 2 else None)
