"""Figures of averaging weights and of the subspace; matplotlib is imported where they are drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_twa.callback import TWAHooks
from lightning_twa.candidates import Candidate
from lightning_twa.checkpoints import read_state
from lightning_twa.subspace.layout import ParameterLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_averaging_weights", "plot_subspace"]

MAX_TICKS = 30
COLOR, ACCENT = "#4c78a8", "#d1495b"


def plot_averaging_weights(source: TWAHooks | str | os.PathLike[str]) -> Figure:
    """Draw how much each candidate counts.

    With one coefficient block a bar for each candidate, the uniform average marked by a line; with
    several, a map of candidates and blocks whose colours are centered at the uniform average.

    Args:
        source: A callback in its phase or after it, or a checkpoint of such a run.

    Returns:
        A matplotlib figure, not shown: ``figure.savefig("weights.png")``.

    Raises:
        ValueError: When there are no averaging weights yet.
        ImportError: Without matplotlib.
    """
    if isinstance(source, TWAHooks):
        weights, names, blocks = (
            source.averaging_weights,
            source.candidate_names,
            source.block_names,
        )
    else:
        state = read_state(source)
        weights, names = state.get("averaging_weights"), state["candidate_names"]
        blocks = state.get("block_names", [])
    if weights is None:
        raise ValueError(
            "There are no averaging weights before the phase begins. Draw them after start_epoch."
        )
    n, count = weights.shape
    figure = _figure(width=max(5.0, min(14.0, 2.5 + 0.3 * n)), height=3.6 if count == 1 else None)
    axes = figure.add_subplot()
    if count == 1:
        _draw_bars(axes, weights[:, 0], names)
    else:
        figure.set_figheight(max(3.6, min(16.0, 1.5 + 0.22 * count)))
        _draw_map(figure, axes, weights, blocks)
    _name_ticks(axes.xaxis, names)
    axes.tick_params(axis="x", rotation=60 if n > 6 else 0)
    axes.set_xlabel("candidate")
    return figure


def _draw_bars(axes: Any, weights: Tensor, names: Sequence[str]) -> None:
    n = len(names)
    axes.bar(range(n), weights.tolist(), color=COLOR, width=0.8)
    label = f"uniform average, 1/{n}"
    axes.axhline(1 / n, color=ACCENT, linestyle="--", linewidth=1.2, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.18)
    axes.legend(frameon=False, loc="best")
    axes.set_ylabel("averaging weight")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(figure: Figure, axes: Any, weights: Tensor, blocks: Sequence[str]) -> None:
    uniform = 1 / weights.shape[0]
    reach = max(float((weights - uniform).abs().max()), 1e-9)
    image = axes.imshow(
        weights.T.numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=uniform - reach,
        vmax=uniform + reach,
        interpolation="nearest",
    )
    _name_ticks(axes.yaxis, blocks, most=60)
    axes.set_ylabel("coefficient block")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(f"averaging weight (white: uniform, 1/{weights.shape[0]})")


def log_figure(loggers: Sequence[Any], callback: TWAHooks, step: int) -> bool:
    """Give the averaging weights as ``twa/averaging_weights`` to TensorBoard loggers.

    Returns:
        Whether there was one, and matplotlib to draw with.
    """
    writers = [logger.experiment for logger in loggers if "TensorBoard" in type(logger).__name__]
    if not writers or importlib.util.find_spec("matplotlib") is None:
        return False
    for writer in writers:
        writer.add_figure("twa/averaging_weights", plot_averaging_weights(callback), step)
    return True


def plot_subspace(
    callback: TWAHooks,
    module: nn.Module,
    loss: Callable[[], float],
    *,
    points: int = 15,
    margin: float = 0.25,
) -> Figure:
    """Draw the loss over the candidates' first two principal directions.

    On it the candidates, their uniform average, the way of the phase and what was learned, all of
    them projected: what they have in other directions is not seen, and the loss at their place in
    the plane is not their own. Axes are in standard deviations of the candidates.

    Args:
        callback: After its run, with the candidates in memory or in files.
        module: The model; its weights and buffers are as before afterwards, also after an
            exception.
        loss: Called without arguments with the weights of each point in ``module``. Buffers are
            those that it holds now; with BatchNorm let ``loss`` re-estimate its statistics
            (``torch.optim.swa_utils.update_bn``), or it means little.
        points: Of the grid, on each axis.
        margin: Room around what is drawn, as a share of its extent.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ValueError: When the callback has no candidates or no averaging weights, or the candidates
            lie on a line.
        ImportError: Without matplotlib.
    """
    candidates, weights = callback.candidates, callback.averaging_weights
    if weights is None or len(candidates) < 3 or len(candidates) != weights.shape[0]:
        raise ValueError(
            f"plot_subspace() needs a callback after its phase, with three candidates or more; "
            f"this one has {len(candidates)} and is in phase {callback.phase!r}."
        )
    path = callback.averaging_path
    if path is None:
        path = torch.stack([torch.full_like(weights, 1 / len(candidates)), weights])
    plane = _Plane.of(candidates, callback.settings.subspace.blocks)
    places = plane.places(torch.eye(len(candidates), dtype=torch.float64))
    way = plane.places(path)
    spread = torch.cat([places, way])
    low, high = spread.amin(dim=0), spread.amax(dim=0)
    room = margin * (high - low).clamp_min(0.5)
    xs, ys = (
        torch.linspace(float(low[i] - room[i]), float(high[i] + room[i]), points) for i in (0, 1)
    )
    values = _losses(module, candidates, plane, xs, ys, loss)

    figure = _figure(6.4, 5.0)
    axes = figure.add_subplot()
    filled = axes.contourf(xs.numpy(), ys.numpy(), values.numpy(), levels=20, cmap="viridis")
    figure.colorbar(filled, ax=axes).set_label("loss")
    (x, y), (u, v) = places.T.numpy(), way.T.numpy()
    axes.scatter(x, y, s=22, color="white", edgecolors="black", label="candidates")
    axes.plot(u, v, color="#f2b134", linewidth=1.8, label="phase")
    for i, label, marker, size, color in (
        (0, "uniform average", "s", 60, COLOR),
        (-1, "learned average", "*", 170, ACCENT),
    ):
        axes.scatter(u[i], v[i], s=size, marker=marker, color=color, ec="white", label=label)
    for i in (0, len(candidates) - 1):
        axes.annotate(
            candidates[i].name,
            (x[i], y[i]),
            color="white",
            fontsize="small",
            xytext=(5, 5),
            textcoords="offset points",
        )
    for name, axis, share in zip(("first", "second"), "xy", plane.shares, strict=True):
        label = f"{name} principal direction, standard deviations ({100 * share:.0f} % of variance)"
        getattr(axes, f"set_{axis}label")(label)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False, fontsize="small"
    )
    return figure


@dataclass(frozen=True)
class _Plane:
    """The plane of two principal directions of candidates.

    Args:
        mix: ``(n, 2)``, averaging weights that one unit on each axis adds.
        grams: ``(B, n, n)`` of the centered candidates.
        shares: Of the variance.
        blocks: Block of each tensor by name.
    """

    mix: Tensor
    grams: Tensor
    shares: list[float]
    blocks: dict[str, int]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], blocks: Any) -> _Plane:
        first, n = candidates[0].parameters, len(candidates)
        varying = {
            name: tensor
            for name, tensor in first.items()
            if any(not torch.equal(c.parameters[name], tensor) for c in candidates[1:])
        }
        layout = ParameterLayout.from_tensors(varying or first, blocks)
        grams = torch.zeros(layout.num_blocks, n, n, dtype=torch.float64)
        for spec in layout.specs:
            rows = torch.stack([c.parameters[spec.name].double().flatten() for c in candidates])
            rows -= rows.mean(dim=0)
            grams[spec.block] += rows @ rows.T
        values, vectors = torch.linalg.eigh(grams.sum(dim=0))
        values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
        if float(values[1]) <= 1e-9 * float(values[0]):
            raise ValueError("The candidates lie on a line: there is no plane to draw.")
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0)[None]).sign()
        total = grams.sum(dim=0).trace()
        shares = (values / total).tolist()
        return cls(vectors / n**0.5, grams, shares, {s.name: s.block for s in layout.specs})

    def places(self, weights: Tensor) -> Tensor:
        """``(points, 2)`` in standard deviations, of averages with weights ``(points, n)`` or
        ``(points, n, B)``.
        """
        weights = weights.double()
        if weights.dim() == 2:
            weights = weights[:, :, None].expand(-1, -1, self.grams.shape[0])
        n = weights.shape[1]
        values = n * torch.einsum("nj,bnm,mj->j", self.mix, self.grams, self.mix)
        along = torch.einsum("pnb,bnm,mj->pj", weights - 1 / n, self.grams, self.mix)
        return along * n / values


@torch.no_grad()
def _losses(
    module: nn.Module,
    candidates: Sequence[Candidate],
    plane: _Plane,
    xs: Tensor,
    ys: Tensor,
    loss: Callable[[], float],
) -> Tensor:
    """``(ys, xs)`` the loss at each point of a grid; the model is put back."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = {name: tensor.detach().clone() for name, tensor in state.items()}
    modes = {m: m.training for m in module.modules()}
    n = len(candidates)
    values = torch.empty(len(ys), len(xs), dtype=torch.float64)
    try:
        for i, y in enumerate(ys.tolist()):
            for j, x in enumerate(xs.tolist()):
                weights = 1 / n + plane.mix @ torch.tensor([x, y], dtype=torch.float64)
                for name in plane.blocks:
                    members = zip(weights.tolist(), candidates, strict=True)
                    total = sum(w * c.parameters[name].double() for w, c in members)
                    state[name].copy_(total)
                for name, tensor in kept.items():
                    if name not in plane.blocks:
                        state[name].copy_(tensor)
                with torch.enable_grad():
                    values[i, j] = float(loss())
    finally:
        for name, tensor in kept.items():
            state[name].copy_(tensor)
        for m, training in modes.items():
            m.training = training
    return values


def _figure(width: float, height: float | None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib: pip install "lightning-twa[plot]", or pip install matplotlib.'
        ) from error
    return Figure(figsize=(width, height or 4.0), layout="constrained")


def _name_ticks(axis: Any, names: Sequence[str], most: int = MAX_TICKS) -> None:
    step = -(-len(names) // most)
    axis.set_ticks(range(0, len(names), step), [names[i] for i in range(0, len(names), step)])
