"""The mathematics, in plain torch: usable in a hand-written training loop."""

from lightning_twa.subspace.build import Subspace, build_subspace
from lightning_twa.subspace.layout import ParameterLayout, TensorSpec
from lightning_twa.subspace.training.optimizer import SubspaceOptimizer
from lightning_twa.subspace.training.solvers import FullMatrixAdam

__all__ = [
    "FullMatrixAdam",
    "ParameterLayout",
    "Subspace",
    "SubspaceOptimizer",
    "TensorSpec",
    "build_subspace",
]
