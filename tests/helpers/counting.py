"""What a step asks of a device, without one: operations and transfers, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# No kernel runs: views, and memory that nothing is written into
FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "device",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "narrow",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}


class Counted(TorchDispatchMode):
    """Counts what the dispatcher is asked for.

    Attributes:
        operations: Of each kind how many that run on the device: about as many kernels.
        transfers: Copies between devices, and questions of the host that the device has to answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.transfers: list[str] = []

    @property
    def launches(self) -> int:
        """Of all kinds."""
        return sum(self.operations.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.__name__.partition(".")[0]
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if name in WAITS and given != {"cpu"}:
            self.transfers.append(f"{function}: the host asks")
        result = function(*args, **kwargs)
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        # numbers without dimensions may be on the host: they go as arguments of the kernel
        large = {t.device.type for t in tree_leaves((args, kwargs)) if _is_large(t)} | made
        if len(large) > 1:
            self.transfers.append(f"{function}: {sorted(large)}")
        if name not in FREE and (made | given) - {"cpu"}:
            self.operations[name] += 1
        return result


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dim() > 0 or value.device.type != "cpu")


class _WithoutGuard(TorchFunctionMode):
    """Indexing and copying in other terms: a torch without CUDA has no guard for its devices, which
    a few methods ask for.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__getitem__ and isinstance(args[0], Tensor):
            return _part(args[0], args[1])
        if function is Tensor.__setitem__ and isinstance(args[0], Tensor):
            return _copy(_part(args[0], args[1]), args[2])
        if function is Tensor.copy_ and args[0].device.type == args[1].device.type:
            return _copy(*args)
        return function(*args, **(kwargs or {}))


def _copy(into: Tensor, what: Tensor) -> Tensor:
    torch._foreach_copy_([into], [what.expand_as(into)])
    return into


def _part(tensor: Tensor, index: Any) -> Tensor:
    dimension = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, slice):
            start, stop, _ = one.indices(tensor.shape[dimension])
            tensor = tensor.narrow(dimension, start, max(stop - start, 0))
            dimension += 1
        elif isinstance(one, Tensor):
            return tensor.index_select(dimension, one.reshape(-1))
        else:
            tensor = tensor.select(dimension, one)
    return tensor


def pretended(stack: ExitStack) -> None:
    """Let tensors on CUDA be made where there is none; they have no values."""
    stack.enter_context(FakeTensorMode())
    stack.enter_context(_WithoutGuard())


def count(what: Callable[[], Any]) -> Counted:
    """Call it, counting."""
    with Counted() as counted:
        what()
    return counted
