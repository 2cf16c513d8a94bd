"""Figures of averaging weights and of the subspace; matplotlib is imported where they are drawn."""

from lightning_twa.figures.loss_plane import plot_subspace
from lightning_twa.figures.weights import log_figure, plot_averaging_weights

__all__ = ["log_figure", "plot_averaging_weights", "plot_subspace"]
