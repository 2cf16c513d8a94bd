"""The plane of the candidates' first two principal directions, and the loss on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.candidates import Candidate, is_running
from lightning_twa.figures.canvas import ink
from lightning_twa.results import RunResults

__all__ = ["Plane", "candidates_of", "check_module", "losses", "name_ends", "name_plane"]

COLUMNS = 1 << 16  # of the candidates held in float64 at a time


@dataclass(frozen=True)
class Plane:
    """The plane of two principal directions of candidates.

    Args:
        mix: ``(n, 2)``, averaging weights that one unit on each axis adds.
        products: ``(B, n, n)`` of the candidates and the centered candidates, ``w_i . (w_m - c)``.
        variances: ``(2,)`` the squared lengths of one unit on each axis.
        shares: Of the variance.
        blocks: Block by name of each tensor that differs between candidates.
    """

    mix: Tensor
    products: Tensor
    variances: Tensor
    shares: list[float]
    blocks: dict[str, int]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], block_names: Sequence[str]) -> Plane:
        """The plane of candidates, of which ``n * 65536`` float64 numbers are held at a time.

        Raises:
            ValueError: When they lie on a line.
        """
        n = len(candidates)
        blocks = _blocks_of(candidates, block_names)
        gram = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        products = torch.zeros(len(block_names), n, n, dtype=torch.float64, device="cpu")
        for name, block in blocks.items():
            for columns in zip(
                *(torch.split(c.parameters[name].flatten(), COLUMNS) for c in candidates),
                strict=True,
            ):
                rows = torch.stack([part.double() for part in columns])
                centered = rows - rows.mean(dim=0)
                gram += centered @ centered.T
                products[block] += rows @ centered.T
        values, vectors = torch.linalg.eigh(gram)
        total, values, vectors = values.sum(), values.flip(0)[:2], vectors.flip(1)[:, :2]
        if float(values[1]) <= 1e-9 * float(values[0]):
            raise ValueError("The candidates lie on a line: there is no plane to draw.")
        # Of an eigenvector's two signs, the one that makes its largest part positive
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0)[None]).sign()
        return cls(vectors / n**0.5, products, values / n, (values / total).tolist(), blocks)

    def places(self, weights: Tensor) -> Tensor:
        """``(points, 2)`` in standard deviations, of averages with weights ``(points, n)`` or
        ``(points, n, B)``.
        """
        weights = weights.double()
        if weights.dim() == 2:
            weights = weights[:, :, None].expand(-1, -1, self.products.shape[0])
        moved = weights - 1 / weights.shape[1]
        return torch.einsum("pnb,bnm,mj->pj", moved, self.products, self.mix) / self.variances


def _blocks_of(candidates: Sequence[Candidate], block_names: Sequence[str]) -> dict[str, int]:
    """Block of each tensor that differs between candidates. Blocks are runs of tensors, and called
    by the first of them.
    """
    firsts = {name.split(" .. ")[0]: b for b, name in enumerate(block_names)}
    first, *others = candidates
    result: dict[str, int] = {}
    block = 0
    for name, tensor in first.parameters.items():
        block = firsts.get(name, block)
        if any(not torch.equal(c.parameters[name], tensor) for c in others):
            result[name] = block
    return result


def candidates_of(callback: RunResults, function: str) -> tuple[list[Candidate], Tensor]:
    """The candidates of a run, and its averaging weights, ``(n, B)``.

    Raises:
        ValueError: When there are fewer than three, or none of the one or the other, naming the
            function that needs them.
    """
    candidates, weights = callback.candidates, callback.averaging_weights
    if weights is None or len(candidates) < 3 or len(candidates) != weights.shape[0]:
        raise ValueError(
            f"{function}() needs a callback after its phase, with three candidates or more; "
            f"this one has {len(candidates)} and is in phase {callback.phase!r}. A finished run "
            f"that was restored from a checkpoint, or copied, has none."
        )
    return candidates, weights


def name_plane(axes: Any, plane: Plane) -> None:
    """Say what the axes are."""
    for name, axis, share in zip(("first", "second"), "xy", plane.shares, strict=True):
        text = f"{name} principal direction ({100 * share:.0f} % of variance),\nstandard deviations"
        getattr(axes, f"set_{axis}label")(text)


def name_ends(
    axes: Any,
    candidates: Sequence[Candidate],
    places: Tensor,
    color: Any = None,
    around: Any = None,
) -> None:
    """The names of the oldest and the newest candidate that are no running averages.

    Args:
        axes: The axes.
        candidates: Oldest first.
        places: ``(n, 2)``.
        color: Of the letters; ``None``: of the axes.
        around: Of their edges; ``None``: what is behind the axes.
    """
    from matplotlib.patheffects import withStroke

    edge = axes.get_facecolor() if around is None else around
    own = [i for i, c in enumerate(candidates) if not is_running(c.name)]
    if len(own) < 2:
        own = list(range(len(candidates)))
    for i, next_one in ((own[0], own[1]), (own[-1], own[-2])):
        above = bool(places[i, 1] >= places[next_one, 1])  # off the others
        left = bool(places[i, 0] > places[:, 0].mean())  # and within the axes
        axes.annotate(
            candidates[i].name,
            places[i].tolist(),
            color=ink(axes) if color is None else color,
            fontsize="small",
            xytext=(-5 if left else 5, 5 if above else -5),
            ha="right" if left else "left",
            va="bottom" if above else "top",
            textcoords="offset points",
            path_effects=[withStroke(linewidth=2, foreground=edge)],
            zorder=7,
        )


def check_module(module: nn.Module, candidate: Candidate) -> None:
    """Check that a module has the parameters of the candidates.

    Raises:
        ValueError: Naming the tensor that it lacks, or has in another shape.
    """
    named = dict(module.named_parameters())
    for name, tensor in candidate.parameters.items():
        if name not in named or named[name].shape != tensor.shape:
            raise ValueError(
                f"The candidates have a tensor {name!r} of shape {tuple(tensor.shape)}, which the "
                f"module has not. Give the module that was trained, with whole (not sharded) "
                f"parameters."
            )


@torch.no_grad()
def losses(
    module: nn.Module,
    candidates: Sequence[Candidate],
    plane: Plane,
    xs: Tensor,
    ys: Tensor,
    loss: Callable[[], float],
) -> Tensor:
    """``(ys, xs)`` the loss at each point of a grid; the model is put back."""
    named = dict(module.named_parameters())
    parts = {name: _directions(candidates, name, plane.mix) for name in plane.blocks}
    values = torch.empty(len(ys), len(xs), dtype=torch.float64, device="cpu")
    for i, y in enumerate(ys.tolist()):
        for j, x in enumerate(xs.tolist()):
            with _put_back(module):
                for name, (center, first, second) in parts.items():
                    named[name].copy_(center + x * first + y * second)
                with torch.enable_grad():
                    values[i, j] = float(loss())
    return values


def _directions(candidates: Sequence[Candidate], name: str, mix: Tensor) -> tuple[Tensor, ...]:
    """Center and two directions of one tensor, summed in float64, kept in float32 or wider."""
    tensors = [candidate.parameters[name].detach() for candidate in candidates]
    kept = torch.promote_types(tensors[0].dtype, torch.float32)
    center = sum(tensor.double() for tensor in tensors) / len(tensors)
    assert isinstance(center, Tensor)
    result = [center.to(kept)]
    for factors in mix.T.tolist():
        parts = (f * (t.double() - center) for f, t in zip(factors, tensors, strict=True))
        total = sum(parts)
        assert isinstance(total, Tensor)
        result.append(total.to(kept))
    return tuple(result)


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Afterwards parameters, gradients, buffers and modes are as they were, bit for bit, also where
    a forward pass has put another tensor in a buffer's place.
    """
    tensors = [*module.parameters(), *module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    gradients = [(p, p.grad) for p in module.parameters()]
    modules = [(m, m.training, dict(m._buffers)) for m in module.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for m, training, buffers in modules:
            m.training = training
            m._buffers.clear()
            m._buffers.update(buffers)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.detach().copy_(values)
