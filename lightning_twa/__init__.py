"""Trainable Weight Averaging for PyTorch Lightning."""

from importlib.metadata import version

from lightning_twa.average import average
from lightning_twa.callback import TWACallback
from lightning_twa.config import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig
from lightning_twa.figures import (
    plot_averaging_weights,
    plot_held_out,
    plot_loss_path,
    plot_path,
    plot_subspace,
)
from lightning_twa.results import Result
from lightning_twa.subspace import Subspace, SubspaceOptimizer, build_subspace

__all__ = [
    "CollectConfig",
    "Result",
    "SolverConfig",
    "StorageConfig",
    "Subspace",
    "SubspaceConfig",
    "SubspaceOptimizer",
    "TWACallback",
    "average",
    "build_subspace",
    "plot_averaging_weights",
    "plot_held_out",
    "plot_loss_path",
    "plot_path",
    "plot_subspace",
]
__version__ = version("lightning-twa")
