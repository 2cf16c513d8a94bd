"""How much each candidate counts, as bars or as a map of candidates and blocks."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_twa.figures.canvas import (
    CHOSEN,
    FIXED,
    LEARNED,
    WIDTH,
    canvas,
    ink,
    legend_above,
    name_ticks,
)
from lightning_twa.figures.names import shortened
from lightning_twa.figures.source import source_of
from lightning_twa.machine import warn
from lightning_twa.results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["log_figure", "plot_averaging_weights"]

ROOM = 26  # characters below the narrowest axes
LETTER = 0.085  # inches
TURNED = 20  # characters of a candidate's name, which may be a file's
BESIDE = 3  # fixed averages that are shown


def plot_averaging_weights(
    source: RunResults | str | os.PathLike[str], *, ax: Axes | None = None
) -> Figure:
    """Draw how much each candidate counts, and in fixed averages.

    With one coefficient block a bar for each candidate; with several, a map of candidates and
    blocks whose colours are centered at the uniform average of the candidates. In its colour bar a
    line marks 0, below which weights are negative. Where averages were compared on held-out data,
    three of them are shown with their weights, as points, or as rows above the map: the chosen one,
    the uniform one, and the best others. Otherwise a line marks the uniform average of the
    candidates. Long names of blocks are shortened.

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
    run = source_of(source)
    weights, names = run.weights, run.names
    if weights is None:
        raise ValueError(
            "There are no averaging weights before the phase begins. Draw them after start_epoch."
        )
    n, count = weights.shape
    fixed = {run.label(name): beta for name, beta in run.averages(BESIDE).items()}
    if count == 1:
        cells = max(2.5, min(WIDTH - 1.0, 1.5 + 0.3 * n))
        figure, axes = canvas(ax, max(5.0, cells + 1.0), 3.6)
        learned = "the run's average" if run.phase == "done" else "the average so far"
        _draw_bars(axes, weights[:, 0], fixed, learned)
    else:
        rows = [*fixed, *shortened(run.blocks)]
        cells = max(2.0, min(0.2 * n, WIDTH - 1.8 - LETTER * max(map(len, rows))))
        width = 1.8 + LETTER * max(map(len, rows)) + cells
        height = max(2.1, min(14.5, 0.22 * len(rows)))
        figure, axes = canvas(ax, width, 1.5 + height)
        _draw_map(axes, weights, fixed)
        length = height if ax is None else None
        name_ticks(axes.yaxis, rows, most=70, length=length, always=len(fixed))
    length = cells if ax is None else None
    shown = name_ticks(axes.xaxis, shortened(names, TURNED), length=length)
    if sum(map(len, shown)) > ROOM:
        for label in axes.get_xticklabels():
            label.set(rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlabel("candidate")
    return figure


def _draw_bars(axes: Any, weights: Tensor, fixed: Mapping[str, Tensor], learned: str) -> None:
    n = len(weights)
    axes.bar(range(n), weights.tolist(), color=LEARNED, width=0.8, label=learned)
    axes.axhline(0, color=ink(axes), linewidth=0.8)
    if not fixed:
        label = f"uniform average, 1/{n}"
        axes.axhline(1 / n, color=CHOSEN, linestyle="--", linewidth=1.2, label=label)
    kinds = zip((CHOSEN, *FIXED), ("D", "o", "^"), (42, 34, 40), strict=True)
    for (name, beta), (color, marker, size) in zip(fixed.items(), kinds, strict=False):
        at = beta.nonzero().flatten()  # the others count for nothing in it
        axes.scatter(
            at.tolist(),
            beta[at].tolist(),
            s=size * min(1.0, 30 / n),
            marker=marker,
            color=color,
            edgecolors=axes.get_facecolor(),
            linewidths=0.7,
            label=name,
            zorder=3,
        )
    axes.set_xlim(-0.8, n - 0.2)
    legend_above(axes)
    axes.set_ylabel("averaging weight")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Any, weights: Tensor, fixed: Mapping[str, Tensor]) -> None:
    uniform = 1 / weights.shape[0]
    shown = torch.stack([*fixed.values(), *weights.T.double()])
    reach = max(float((shown - uniform).abs().max()), 1e-9)
    image = axes.imshow(
        shown.numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=uniform - reach,
        vmax=uniform + reach,
        interpolation="nearest",
    )
    if fixed:
        axes.axhline(len(fixed) - 0.5, color="black", linewidth=2)
    axes.set_ylabel("coefficient block")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.1, aspect=30)
    zero = ""
    if reach > uniform:
        bar.ax.axhline(0, color="black", linewidth=1.2)
        zero = "; line: 0"
    bar.set_label(f"averaging weight\n(white: uniform, 1/{weights.shape[0]}{zero})")


def log_figure(trainer: Trainer, results: RunResults) -> None:
    """Give the averaging weights of a finished run as ``twa/averaging_weights`` to the loggers that
    take figures (TensorBoard, W&B, MLflow), if there is matplotlib to draw with; on rank zero. A
    failure is a warning: a run must not end with an error for a figure.
    """
    if results.phase != "done" or not trainer.is_global_zero:
        return
    if importlib.util.find_spec("matplotlib") is None:
        return
    for logger in trainer.loggers:
        kinds = [cls.__name__ for cls in type(logger).__mro__ if cls.__name__ in TAKING]
        if not kinds:
            continue
        try:
            TAKING[kinds[0]](logger, plot_averaging_weights(results), trainer.global_step)
        except Exception as error:
            name = kinds[0].removesuffix("Logger")
            warn(f"{name} got no figure of the averaging weights: {error}")


def _to_tensorboard(logger: Any, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(NAME, figure, step)


def _to_wandb(logger: Any, figure: Figure, step: int) -> None:
    from PIL import Image  # matplotlib needs it; W&B would take a figure by way of pyplot's state

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    logger.log_image(NAME, [Image.open(picture)], step=step)


def _to_mlflow(logger: Any, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{NAME}.png")


NAME = "twa/averaging_weights"
TAKING = {  # by the name of the class: either package of Lightning has them
    "TensorBoardLogger": _to_tensorboard,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
}
