"""Figures of averaging weights, losses and the subspace; matplotlib is imported where it draws."""

from lightning_twa.figures.held_out import plot_held_out, plot_loss_path
from lightning_twa.figures.loss_plane import plot_subspace
from lightning_twa.figures.path import plot_path
from lightning_twa.figures.weights import log_figure, plot_averaging_weights

__all__ = [
    "log_figure",
    "plot_averaging_weights",
    "plot_held_out",
    "plot_loss_path",
    "plot_path",
    "plot_subspace",
]
