"""The way of the phase over the plane of the candidates, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_twa.figures.canvas import (
    CHOSEN,
    FIXED,
    LEARNED,
    NEUTRAL,
    WIDTH,
    canvas,
    ink,
    legend_above,
)
from lightning_twa.figures.plane import Plane, candidates_of, name_ends, name_plane
from lightning_twa.figures.source import source_of
from lightning_twa.results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_path"]

BESIDE = 3  # fixed averages that are shown


def plot_path(callback: RunResults, *, ax: Axes | None = None) -> Figure:
    """Draw the way of the phase over the candidates' first two principal directions.

    With it the candidates, the run's average, and fixed averages: those that held-out data were
    compared on, the chosen one, the uniform one and the best others; without such data the uniform
    average of all candidates. All of them are projected: what they have in other directions is not
    seen. Axes are in standard deviations of the candidates. No loss is evaluated; with the loss
    below it is :func:`plot_subspace`.

    Args:
        callback: In its phase or after it, with the candidates in memory or in files.
        ax: Where to draw; ``None`` makes a figure.

    Returns:
        The matplotlib figure, not shown: ``figure.savefig("path.png")``.

    Raises:
        ValueError: When the callback has no candidates or no averaging weights, or the candidates
            lie on a line.
        ImportError: Without matplotlib.
    """
    candidates, weights = candidates_of(callback, "plot_path")
    figure, axes = canvas(ax, WIDTH, 4.6)
    plane = Plane.of(candidates, callback.block_names)
    n = len(candidates)
    places = plane.places(torch.eye(n, dtype=torch.float64, device="cpu"))
    _mark(axes, places, NEUTRAL, "o", 20, "candidates", zorder=2)
    path = callback.averaging_path
    way = plane.places(weights[None] if path is None else path)
    axes.plot(*way.T.numpy(), color=LEARNED, linewidth=1.8, label="phase", zorder=4)
    run = source_of(callback)
    fixed = {run.label(name): beta for name, beta in run.averages(BESIDE).items()}
    fixed = fixed or {"uniform average": torch.full((n,), 1 / n, dtype=torch.float64, device="cpu")}
    kinds = zip((CHOSEN, *FIXED), ("D", "s", "^"), strict=True)
    for (name, beta), (color, marker) in zip(fixed.items(), kinds, strict=False):
        _mark(axes, plane.places(beta[None]), color, marker, 45, name, zorder=6)
    label = "the run's average" if run.phase == "done" else "the average so far"
    _mark(axes, plane.places(weights[None]), LEARNED, "*", 220, label, zorder=5)
    axes.margins(0.08)  # names of candidates
    name_ends(axes, candidates, places)
    name_plane(axes, plane)
    legend_above(axes)
    return figure


def _mark(
    axes: Any, places: Tensor, color: str, marker: str, size: float, label: str, zorder: int
) -> None:
    axes.scatter(
        *places.T.numpy(),
        s=size,
        marker=marker,
        color=color,
        edgecolors=ink(axes) if marker == "*" else axes.get_facecolor(),
        linewidths=0.7,
        label=label,
        zorder=zorder,
    )
