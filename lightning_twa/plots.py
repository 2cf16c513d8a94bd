"""Figures of averaging weights and of the subspace; matplotlib is imported where they are drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_twa.callback import TWAHooks
from lightning_twa.candidates import Candidate
from lightning_twa.config import is_int, is_real
from lightning_twa.inspecting import read_run
from lightning_twa.plane import Plane, check_module, losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_averaging_weights", "plot_subspace"]

MAX_TICKS = 30
MAX_NAME = 44  # characters of a block's name
TICK = 0.2  # inches between labels, at least
ROOM = 26  # characters below the narrowest axes
LEVELS = 20  # of the loss
COLOR, ACCENT, PATH = "#4c78a8", "#d1495b", "#f2b134"


def plot_averaging_weights(
    source: TWAHooks | str | os.PathLike[str], *, ax: Axes | None = None
) -> Figure:
    """Draw how much each candidate counts.

    With one coefficient block a bar for each candidate, the uniform average marked by a line; with
    several, a map of candidates and blocks whose colours are centered at the uniform average. In
    its colour bar a line marks 0, below which weights are negative.

    Args:
        source: A callback in its phase or after it, or a checkpoint of such a run, of which no
            Python objects are loaded.
        ax: Where to draw; ``None`` makes a figure.

    Returns:
        The matplotlib figure, not shown: ``figure.savefig("weights.png")``.

    Raises:
        ValueError: When there are no averaging weights yet, or the file is not such a checkpoint.
        ImportError: Without matplotlib.
    """
    if isinstance(source, TWAHooks):
        weights, names, blocks = (
            source.averaging_weights,
            source.candidate_names,
            source.block_names,
        )
    else:
        state = read_run(source)
        weights, names = state.get("averaging_weights"), state["candidate_names"]
        blocks = state.get("block_names", [])
    if weights is None:
        raise ValueError(
            "There are no averaging weights before the phase begins. Draw them after start_epoch."
        )
    n, count = weights.shape
    if count == 1:
        figure, axes = _canvas(ax, max(5.0, min(14.0, 2.5 + 0.3 * n)), 3.6)
        _draw_bars(axes, weights[:, 0], names)
    else:
        blocks = [_shortened(name) for name in blocks]
        text = 0.085 * max(map(len, blocks))  # inches; a third of a figure is not for names alone
        cells = max(3.0, min(10.0, 0.2 * n))
        figure, axes = _canvas(ax, 1.8 + text + cells, max(3.6, min(16.0, 1.5 + 0.22 * count)))
        _draw_map(axes, weights, blocks)
    shown = _name_ticks(axes.xaxis, names)
    if sum(map(len, shown)) > ROOM:
        for label in axes.get_xticklabels():
            label.set(rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlabel("candidate")
    return figure


def _draw_bars(axes: Any, weights: Tensor, names: Sequence[str]) -> None:
    n = len(names)
    axes.bar(range(n), weights.tolist(), color=COLOR, width=0.8)
    label = f"uniform average, 1/{n}"
    axes.axhline(1 / n, color=ACCENT, linestyle="--", linewidth=1.2, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.8, n - 0.2)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    axes.set_ylabel("averaging weight")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Any, weights: Tensor, blocks: Sequence[str]) -> None:
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
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.1, aspect=30)
    zero = ""
    if reach > uniform:
        bar.ax.axhline(0, color="black", linewidth=1.2)
        zero = "; line: 0"
    bar.set_label(f"averaging weight\n(white: uniform, 1/{weights.shape[0]}{zero})")


def log_figure(loggers: Sequence[Any], callback: TWAHooks, step: int) -> None:
    """Give the averaging weights as ``twa/averaging_weights`` to TensorBoard loggers, if there is
    matplotlib to draw with. A failure is a warning: a run must not end with an error for a figure.
    """
    writers = [logger.experiment for logger in loggers if "TensorBoard" in type(logger).__name__]
    if importlib.util.find_spec("matplotlib") is None:
        return
    for writer in writers:
        try:
            writer.add_figure("twa/averaging_weights", plot_averaging_weights(callback), step)
        except Exception as error:
            rank_zero_warn(f"TensorBoard got no figure of the averaging weights: {error}")


def plot_subspace(
    callback: TWAHooks,
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
    candidates, weights = callback.candidates, callback.averaging_weights
    if weights is None or len(candidates) < 3 or len(candidates) != weights.shape[0]:
        raise ValueError(
            f"plot_subspace() needs a callback after its phase, with three candidates or more; "
            f"this one has {len(candidates)} and is in phase {callback.phase!r}. A finished run "
            f"that was restored from a checkpoint has none."
        )
    check_module(module, candidates[0])
    figure, axes = _canvas(ax, 6.8, 5.2)  # before the loss is evaluated: it may be slow
    plane = Plane.of(candidates, callback.block_names)
    n = len(candidates)
    path = callback.averaging_path
    start = torch.full_like(weights, 1 / n)[None]
    way = plane.places(torch.cat([start, weights[None]]) if path is None else path)
    places, average, learned = (
        plane.places(w) for w in (torch.eye(n, dtype=torch.float64), start, weights[None])
    )
    spread = torch.cat([places, way, learned])
    low, high = spread.amin(dim=0), spread.amax(dim=0)
    room = margin * (high - low)
    xs, ys = (
        torch.linspace(float(low[i] - room[i]), float(high[i] + room[i]), points) for i in (0, 1)
    )
    values = losses(module, candidates, plane, xs, ys, loss)
    _draw_losses(axes, xs, ys, values)
    (x, y), (u, v) = places.T.numpy(), way.T.numpy()
    axes.scatter(x, y, s=22, color="white", edgecolors="black", label="candidates", zorder=3)
    axes.plot(u, v, color=PATH, linewidth=1.8, label="phase", zorder=4)
    for place, label, marker, size, color in (
        (average, "uniform average", "s", 60, COLOR),
        (learned, "learned average", "*", 170, ACCENT),
    ):
        axes.scatter(
            *place.T.numpy(), s=size, marker=marker, color=color, ec="white", label=label, zorder=5
        )
    _name_ends(axes, candidates, places)
    for name, axis, share in zip(("first", "second"), "xy", plane.shares, strict=True):
        text = f"{name} principal direction ({100 * share:.0f} % of variance),\nstandard deviations"
        getattr(axes, f"set_{axis}label")(text)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize="small"
    )
    return figure


def _draw_losses(axes: Any, xs: Tensor, ys: Tensor, values: Tensor) -> None:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        raise ValueError("The loss is finite nowhere on the plane: there is nothing to draw.")
    low, high, most = float(finite.min()), float(finite.quantile(0.95)), float(finite.max())
    # A few far corners would take all colours; they get the last one
    far = most - low > 4 * (high - low) > 0
    high = max(high if far else most, low + 1e-6 * max(abs(low), 1e-6))
    levels = low + (high - low) * torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64).square()
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

    return colormaps["viridis"](torch.linspace(0, 1, count).numpy())


def _name_ends(axes: Any, candidates: Sequence[Candidate], places: Tensor) -> None:
    """The names of the oldest and the newest candidate."""
    from matplotlib.patheffects import withStroke

    for i, next_one in ((0, 1), (len(candidates) - 1, len(candidates) - 2)):
        above = bool(places[i, 1] >= places[next_one, 1])  # off the others
        axes.annotate(
            candidates[i].name,
            places[i].tolist(),
            color="white",
            fontsize="small",
            xytext=(5, 5 if above else -5),
            va="bottom" if above else "top",
            textcoords="offset points",
            path_effects=[withStroke(linewidth=2, foreground="black")],
            zorder=6,
        )


# --- drawing


def _canvas(ax: Axes | None, width: float, height: float) -> tuple[Figure, Any]:
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


def _shortened(name: str) -> str:
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half:]}"


def _name_ticks(axis: Any, names: Sequence[str], most: int = MAX_TICKS) -> Sequence[str]:
    """Names every tick, or every second, ...; returns the names that are shown."""
    box = axis.axes.get_window_extent()
    length = box.width if axis.axis_name == "x" else box.height
    fit = int(length / axis.axes.figure.dpi / TICK)
    step = -(-len(names) // max(2, min(most, fit)))
    shown = names[::step]
    axis.set_ticks(range(0, len(names), step), shown)
    return shown
