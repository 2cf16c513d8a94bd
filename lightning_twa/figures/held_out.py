"""Losses on held-out data: of fixed and learned averages, and along the path of the phase."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from lightning_twa.figures.names import shortened
from lightning_twa.figures.source import source_of
from lightning_twa.results import Result, RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_held_out", "plot_loss_path"]

STAR = 150  # size of the result
FAR = 4  # times the extent of three quarters of the losses: beyond, they are at the edge


def plot_held_out(source: RunResults | str | os.PathLike[str], *, ax: Axes | None = None) -> Figure:
    """Draw the table of losses on held-out data: what each average was worth, best first.

    A star is the result of the run, a diamond the fixed average that was chosen as the start. Where
    the result was learned, a bar is the standard error of its difference to the start. Losses far
    above the others, or that are not finite, are at the right edge; their numbers are beside.

    Args:
        source: A callback after its run, or the checkpoint of a finished run, of which no Python
            objects are loaded.
        ax: Where to draw; ``None`` makes a figure.

    Returns:
        The matplotlib figure, not shown: ``figure.savefig("heldout.png")``.

    Raises:
        ValueError: When nothing was compared on held-out data, or the file is no such checkpoint.
        ImportError: Without matplotlib.
    """
    result = source_of(source).compared()
    rows = result.rows()
    finite = sorted(row.loss for row in rows if math.isfinite(row.loss))
    if not finite:
        raise ValueError("No loss on the held-out data is finite: there is nothing to draw.")
    figure, axes = canvas(ax, WIDTH, 1.5 + 0.25 * len(rows))
    low, high, edge = _limits(finite)
    if result.accepted is not None and math.isfinite(result.gain_error):
        low = min(low, result.path[result.accepted] - result.gain_error)
    for y, row in enumerate(rows):
        inside = row.loss <= high
        color, marker, size = NEUTRAL, "o", 36
        if row.learned:
            color = LEARNED
        elif row.chosen:
            color, marker = CHOSEN, "D"
        if row.result:
            marker, size = "*", STAR
        x = row.loss if inside else edge
        axes.scatter(x, y, s=size, color=color, marker=marker if inside else ">", zorder=3)
        text = f"{row.loss:.5g}"
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center")
        if row.chosen:
            axes.axvline(row.loss, color=CHOSEN, linestyle="--", linewidth=1, zorder=1)
        if row.result and row.learned and math.isfinite(result.gain_error):
            axes.errorbar(x, y, xerr=result.gain_error, color=color, capsize=3, zorder=2)
    axes.set_yticks(range(len(rows)), shortened([row.name for row in rows]))
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the best above
    room = 0.04 * (edge - low) or 0.1 * abs(low) or 1.0  # of a single loss
    axes.set_xlim(low - room, edge + room)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"loss on {result.heldout}, {result.extent}")
    _explain(axes, result)
    return figure


def _limits(finite: Sequence[float]) -> tuple[float, float, float]:
    """The smallest loss, the largest that is drawn at its place, and where the others are."""
    low, most = finite[0], finite[-1]
    usual = finite[(3 * (len(finite) - 1)) // 4]
    high = most
    if most - low > FAR * (usual - low) > 0:
        high = max(x for x in finite if x - low <= FAR * (usual - low))
    return low, high, high if high == most else high + 0.15 * (high - low)


def _explain(axes: Any, result: Result) -> None:
    """What marks and colours mean."""
    from matplotlib.lines import Line2D

    learned = result.accepted is not None
    marks: Mapping[str, tuple[str, str]] = {
        "the run's result": ("*", LEARNED if learned else CHOSEN),
        "learned": ("o", LEARNED),
        "fixed, chosen as start": ("D", CHOSEN),
        "fixed": ("o", NEUTRAL),
    }
    handles = [
        Line2D([], [], color=color, marker=marker, ms=6 + 4 * (marker == "*"), ls="", label=name)
        for name, (marker, color) in marks.items()
    ]
    legend_above(axes, handles, side="right")  # names on the left may be long


def plot_loss_path(
    source: RunResults | str | os.PathLike[str], *, ax: Axes | None = None
) -> Figure:
    """Draw the loss on held-out data along the path of the phase.

    A point is the average after so many optimizer steps of the phase; lines are the loss of the
    fixed average that was chosen as the start, and of the best fixed one, where that is another. A
    star is the point that is the run's result, with the standard error of its difference to the
    start. Without a star the start is the result.

    Args:
        source: A callback after its run, or the checkpoint of a finished run, of which no Python
            objects are loaded.
        ax: Where to draw; ``None`` makes a figure.

    Returns:
        The matplotlib figure, not shown: ``figure.savefig("loss-path.png")``.

    Raises:
        ValueError: When nothing was compared on held-out data, no point of the path has a finite
            loss, or the file is no such checkpoint.
        ImportError: Without matplotlib.
    """
    result = source_of(source).compared()
    points = [(step, x) for step, x in sorted(result.path.items()) if math.isfinite(x)]
    if not points:
        raise ValueError(
            "No point of the phase's path has a finite loss on the held-out data: there is no path "
            "to draw."
        )
    figure, axes = canvas(ax, WIDTH, 3.6)
    missing = len(result.path) - len(points)
    label = f"path ({missing} not finite)" if missing else "path"
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=LEARNED, marker="o", markersize=5, label=label, zorder=3)
    assert result.start is not None
    fixed = {name: x for name, x in result.losses.items() if math.isfinite(x)}
    best = min(fixed, key=lambda name: fixed[name], default=None)
    ends = " and result" if result.accepted is None else ""
    lines = [(result.start, f"chosen as start{ends}", CHOSEN, "--")]
    if best is not None and best != result.start:
        lines.append((best, "best fixed one", FIXED[0], ":"))
    for name, what, color, style in lines:
        (short,) = shortened([name])
        axes.axhline(
            result.losses[name],
            color=color,
            linestyle=style,
            linewidth=1.5,
            label=f"{short}, {what}",
        )
    if result.accepted is not None and result.accepted in dict(points):
        step, loss = result.accepted, result.path[result.accepted]
        if math.isfinite(result.gain_error):
            axes.errorbar(step, loss, yerr=result.gain_error, color=LEARNED, capsize=4, zorder=2)
        axes.scatter(
            step,
            loss,
            s=STAR,
            marker="*",
            color=LEARNED,
            edgecolors=ink(axes),
            linewidths=0.7,
            label="the run's result",
            zorder=4,
        )
    axes.set_xlim(0, 1.03 * max(result.steps, *steps))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("optimizer step of the phase")
    axes.set_ylabel(f"loss on {result.heldout}")
    legend_above(axes)
    return figure
