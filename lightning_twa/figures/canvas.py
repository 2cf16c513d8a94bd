"""Axes to draw on, and names along them; matplotlib is imported where they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ACCENT", "COLOR", "PATH", "canvas", "name_ticks", "shortened"]

MAX_TICKS = 30
MAX_NAME = 44  # characters of a block's name
TICK = 0.2  # inches between labels, at least
COLOR, ACCENT, PATH = "#4c78a8", "#d1495b", "#f2b134"


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


def shortened(name: str) -> str:
    """Beginning and end of a long name."""
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half:]}"


def name_ticks(axis: Any, names: Sequence[str], most: int = MAX_TICKS) -> Sequence[str]:
    """Names every tick, or every second, ...; returns the names that are shown."""
    box = axis.axes.get_window_extent()
    length = box.width if axis.axis_name == "x" else box.height
    fit = int(length / axis.axes.figure.dpi / TICK)
    step = -(-len(names) // max(2, min(most, fit)))
    shown = names[::step]
    axis.set_ticks(range(0, len(names), step), shown)
    return shown
