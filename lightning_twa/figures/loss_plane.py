"""The loss over the plane of the candidates' first two principal directions, as a figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_twa.config import is_int, is_real
from lightning_twa.figures.canvas import FIXED, LEARNED, WIDTH, canvas, legend_above
from lightning_twa.figures.plane import (
    Plane,
    candidates_of,
    check_module,
    losses,
    name_ends,
    name_plane,
)
from lightning_twa.results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_subspace"]

LEVELS = 20  # of the loss
PATH = "#f0e442"  # seen on all of the colours below it but the last, where the loss is high


def plot_subspace(
    callback: RunResults,
    module: nn.Module,
    loss: Callable[[], float],
    *,
    points: int = 15,
    margin: float = 0.25,
    ax: Axes | None = None,
) -> Figure:
    """Draw the loss over the candidates' first two principal directions.

    On it the candidates, their uniform average, the way of the phase and what was learned, all of
    them projected: what they have in other directions is not seen, and the loss at their place in
    the plane is not their own. Axes are in standard deviations of the candidates. Steps between
    colours grow with the loss, quadratically, so that in a bowl they are equally far apart.

    Args:
        callback: After its run, with the candidates in memory or in files.
        module: The model; its weights, gradients, buffers and modes are as before afterwards, also
            after an exception.
        loss: Called without arguments with the weights of each point in ``module``, and with the
            buffers that it holds now; with BatchNorm let ``loss`` re-estimate its statistics
            (``torch.optim.swa_utils.update_bn``), or it means little. Evaluate the same data
            each time.
        points: Of the grid, on each axis; at least 2.
        margin: Room around what is drawn, as a share of its extent; at least 0.
        ax: Where to draw; ``None`` makes a figure.

    Returns:
        The matplotlib figure, not shown.

    Raises:
        ValueError: When an argument is out of its range, the callback has no candidates or no
            averaging weights, the module is another one's, the candidates lie on a line, or the
            loss is finite nowhere.
        ImportError: Without matplotlib.
    """
    if not (is_int(points) and points >= 2):
        raise ValueError(f"Invalid {points=}. Must be an int >= 2.")
    if not (is_real(margin) and margin >= 0):
        raise ValueError(f"Invalid {margin=}. Must be a number >= 0.")
    candidates, weights = candidates_of(callback, "plot_subspace")
    check_module(module, candidates[0])
    figure, axes = canvas(ax, WIDTH, 5.0)  # before the loss is evaluated: it may be slow
    plane = Plane.of(candidates, callback.block_names)
    n = len(candidates)
    path = callback.averaging_path
    start = torch.full_like(weights, 1 / n)[None]
    way = plane.places(torch.cat([start, weights[None]]) if path is None else path)
    places, average, learned = (
        plane.places(w)
        for w in (torch.eye(n, dtype=torch.float64, device="cpu"), start, weights[None])
    )
    spread = torch.cat([places, way, learned])
    low, high = spread.amin(dim=0), spread.amax(dim=0)
    room = margin * (high - low)
    xs, ys = (
        torch.linspace(float(low[i] - room[i]), float(high[i] + room[i]), points, device="cpu")
        for i in (0, 1)
    )
    values = losses(module, candidates, plane, xs, ys, loss)
    _draw_losses(axes, xs, ys, values)
    (x, y), (u, v) = places.T.numpy(), way.T.numpy()
    axes.scatter(x, y, s=22, color="white", edgecolors="black", label="candidates", zorder=3)
    axes.plot(u, v, color=PATH, linewidth=1.8, label="phase", zorder=4)
    for place, label, marker, size, color in (
        (average, "uniform average", "s", 60, FIXED[0]),
        (learned, "the run's average", "*", 190, LEARNED),
    ):
        axes.scatter(
            *place.T.numpy(), s=size, marker=marker, color=color, ec="white", label=label, zorder=5
        )
    name_ends(axes, candidates, places, color="white", around="black")
    name_plane(axes, plane)
    legend_above(axes)
    return figure


def _draw_losses(axes: Any, xs: Tensor, ys: Tensor, values: Tensor) -> None:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        raise ValueError("The loss is finite nowhere on the plane: there is nothing to draw.")
    low, high, most = float(finite.min()), float(finite.quantile(0.95)), float(finite.max())
    # A few far corners would take all colours; they get the last one
    far = most - low > 4 * (high - low) > 0
    high = max(high if far else most, low + 1e-6 * max(abs(low), 1e-6))
    steps = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64, device="cpu")
    levels = low + (high - low) * steps.square()
    axes.set_facecolor("lightgrey")  # where the loss is not finite
    filled = axes.contourf(
        xs.numpy(),
        ys.numpy(),
        values.numpy(),
        levels=levels.numpy(),
        colors=_colors(LEVELS + 1 if far else LEVELS),
        extend="max" if far else "neither",
    )
    bar = axes.figure.colorbar(filled, ax=axes, format="%.3g", ticks=levels[::2].numpy())
    bar.set_label("loss" if len(finite) == values.numel() else "loss (grey: not finite)")


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](torch.linspace(0, 1, count, device="cpu").numpy())
