"""Axes to draw on, their colours, and names along them; matplotlib is imported where they are
drawn. What is not coloured is as the style in use has it, so that figures can be dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CHOSEN",
    "FIXED",
    "LEARNED",
    "NEUTRAL",
    "WIDTH",
    "canvas",
    "ink",
    "legend_above",
    "name_ticks",
]

MAX_TICKS = 30
TICK = 0.2  # inches between labels, at least
WIDTH = 6.4  # inches: letters are readable where a figure is shown 640 pixels wide
NARROW = 4.0  # inches of axes, below which a legend has two columns
# Okabe and Ito's colours, which everybody can tell apart, and which are seen on white and on black
LEARNED, CHOSEN, FIXED, NEUTRAL = "#0072b2", "#d55e00", ("#009e73", "#cc79a7"), "0.5"


def canvas(ax: Axes | None, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own, which the state of pyplot knows nothing of, or the one of the axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib: pip install "lightning-twa[plot]", or pip install matplotlib.'
        ) from error
    if ax is not None:
        return ax.figure, ax  # type: ignore[return-value]
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def ink(axes: Any) -> Any:
    """The colour that axes are drawn with."""
    return axes.spines["bottom"].get_edgecolor()


def legend_above(axes: Any, handles: Sequence[Any] | None = None, *, side: str = "left") -> None:
    """A legend above the axes, of as many columns as there is room for.

    Args:
        axes: The axes.
        handles: What it is of; ``None``: of what is drawn and has a label.
        side: Of the axes, which it begins at.
    """
    width = axes.get_window_extent().width / axes.figure.dpi
    axes.legend(
        handles=handles,
        loc=f"lower {side}",
        bbox_to_anchor=(0.0 if side == "left" else 1.0, 1.0),
        ncols=2 if width < NARROW else 4,
        frameon=False,
        fontsize="small",
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.2,
    )


def name_ticks(
    axis: Any,
    names: Sequence[str],
    most: int = MAX_TICKS,
    *,
    length: float | None = None,
    always: int = 0,
) -> Sequence[str]:
    """Names every tick, or every second, ...; returns the names that are shown.

    Args:
        axis: Of the axes, from 0 on.
        names: Of the ticks.
        most: How many.
        length: Of the axis in inches, once everything has its place; ``None``: as it is.
        always: How many of the first ones are named in any case.
    """
    if length is None:
        box = axis.axes.get_window_extent()
        length = (box.width if axis.axis_name == "x" else box.height) / axis.axes.figure.dpi
    rest = len(names) - always
    step = -(-rest // max(2, min(most, int(length / TICK)) - always))
    ticks = [*range(always), *range(always, len(names), step)]
    shown = [names[i] for i in ticks]
    axis.set_ticks(ticks, shown)
    return shown
