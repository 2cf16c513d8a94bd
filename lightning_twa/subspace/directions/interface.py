"""What directions do, however they are kept, and how they measure what keeping them loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from lightning_twa.subspace.directions.scratch import Scratch

__all__ = ["Directions", "Released", "fill", "relative", "squared_error", "squared_errors"]


ALIGNMENT = 64  # bytes, of torch's memory on the CPU


class Directions(Protocol):
    """``k`` directions of ``D`` columns."""

    num_directions: int
    error: float
    """Relative error of what is stored, ``||u - stored|| / ||u||``, of all columns; without the
    rounding of the products that directions are mixed by."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def path(self) -> str:
        """How the products are computed, in a word."""

    def write(self, tile: int, values: Tensor, scratch: Scratch) -> Tensor:
        """Take a tile of the padded vector; several threads may write a tile each.

        Args:
            tile: Its index.
            values: ``(k, columns)`` float32 or float64 on the CPU, from its first column to the end
                of the group with its last one that is no padding. They are overwritten.
            scratch: Memory of this thread.

        Returns:
            ``(2,)`` float64 on the CPU: squares of what storing loses, and of the values.
        """

    def write_tiles(self, first: int, values: Tensor, scratch: Scratch) -> Tensor:
        """Take whole tiles at once, where the directions are kept. The host does not wait.

        Args:
            first: The first one's index.
            values: ``(tiles, k, TILE)`` float64, 0 in padding. They may be overwritten.
            scratch: Memory on their device.

        Returns:
            ``(tiles, 2)`` float64 there: as :meth:`write`, of each tile.
        """

    def pieces(self, tiles: slice) -> list[Tensor]:
        """What :meth:`write` has written of tiles: contiguous views, to be filled by what another
        process has written; before :meth:`close`.
        """

    def close(self, squares: Tensor) -> None:
        """All columns are written.

        Args:
            squares: Sums of what :meth:`write` has returned, of all processes that share them.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, by name, where it is kept: the tensors themselves."""

    def load_state_dict(
        self, state: Mapping[str, Tensor], error: float, *, shares: bool = False
    ) -> None:
        """Take what other directions of the same layout have stored, instead of :meth:`write` and
        :meth:`close`.

        Args:
            state: Of :meth:`state_dict`, on any device.
            error: Theirs.
            shares: See :func:`fill`; nothing writes to what is stored.

        Raises:
            ValueError: Naming the tensor that is missing or of another shape or dtype.
        """

    def prepare(self, agree: Callable[[bool], bool]) -> None:
        """Compile what is to be compiled, where that works in every process that shares the
        subspace: the same sums in another order would give them other weights.

        Args:
            agree: Whether its argument is true in every process; all of them call it.
        """

    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """``(k, B)`` float64 where the device has it; see :meth:`Subspace.project`."""

    def expand(self, coefficients: Tensor, center: Tensor, out: Sequence[Tensor]) -> None:
        """See :meth:`Subspace.expand`."""

    def dense(self) -> Tensor:
        """``(k, D)`` what is stored, in the layout's dtype; for inspection."""


class Released:
    """What is left of directions whose memory has been freed.

    Args:
        directions: These.
    """

    def __init__(self, directions: Directions) -> None:
        self.num_directions = directions.num_directions
        self.error = directions.error
        self.nbytes = 0
        self.path = "released"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"The directions of this subspace have been released, so there is no {name!r} of them."
        )


def fill(
    held: Mapping[str, Tensor], state: Mapping[str, Tensor], *, shares: bool = False
) -> dict[str, Tensor]:
    """Tensors with the values of a state: others of the same names, which are written to.

    Args:
        held: Name to tensor to write to.
        state: Name to tensor, on any device.
        shares: Take a tensor of the state itself where it is on the device, and aligned as torch's
            own memory is: the order of the sums in a product may depend on that.

    Raises:
        ValueError: Naming the tensor that is missing or of another shape or dtype.
    """
    filled = {}
    for name, tensor in held.items():
        found = state.get(name)
        if found is None:
            raise ValueError(f"There is no tensor {name!r}.")
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(
                f"Tensor {name!r} is {tuple(found.shape)} {found.dtype}, not "
                f"{tuple(tensor.shape)} {tensor.dtype}."
            )
        there = found.device == tensor.device and found.is_contiguous()
        if shares and there and found.data_ptr() % ALIGNMENT == 0:
            filled[name] = found
        else:
            filled[name] = tensor.copy_(found)
    return filled


def squared_error(stored: Tensor, exact: Tensor) -> Tensor:
    """What :meth:`Directions.write` returns.

    Args:
        stored: ``(k, columns)`` float32 or float64; overwritten by the error.
        exact: The same in full.
    """
    norms = [torch.linalg.vector_norm(t, dim=-1).double() for t in (stored.sub_(exact), exact)]
    return torch.stack([norm.square().sum() for norm in norms])


def squared_errors(stored: Tensor, exact: Tensor) -> Tensor:
    """What :meth:`Directions.write_tiles` returns.

    Args:
        stored: ``(tiles, k, columns)`` float32 or float64; overwritten by the error.
        exact: The same in full.
    """
    norms = [torch.linalg.vector_norm(t, dim=-1).double() for t in (stored.sub_(exact), exact)]
    return torch.stack([norm.square().sum(dim=1) for norm in norms], dim=1)


def relative(squares: Tensor) -> float:
    """Norm of the error over norm of the exact values; 0 where these are zero."""
    error, norm = squares.tolist()
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
