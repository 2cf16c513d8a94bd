"""How much each candidate counts, as bars or as a map of candidates and blocks."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_twa.checkpoint import read_state
from lightning_twa.figures.canvas import ACCENT, COLOR, canvas, name_ticks, shortened
from lightning_twa.machine import warn
from lightning_twa.results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["log_figure", "plot_averaging_weights"]

ROOM = 26  # characters below the narrowest axes


def plot_averaging_weights(
    source: RunResults | str | os.PathLike[str], *, ax: Axes | None = None
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
    if isinstance(source, RunResults):
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
    if count == 1:
        figure, axes = canvas(ax, max(5.0, min(14.0, 2.5 + 0.3 * n)), 3.6)
        _draw_bars(axes, weights[:, 0], names)
    else:
        blocks = [shortened(name) for name in blocks]
        text = 0.085 * max(map(len, blocks))  # inches; a third of a figure is not for names alone
        cells = max(3.0, min(10.0, 0.2 * n))
        figure, axes = canvas(ax, 1.8 + text + cells, max(3.6, min(16.0, 1.5 + 0.22 * count)))
        _draw_map(axes, weights, blocks)
    shown = name_ticks(axes.xaxis, names)
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
    name_ticks(axes.yaxis, blocks, most=60)
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
