"""How the averaging coefficients are trained: what the solver steps, how far, and how several
processes take a step together.
"""

from lightning_twa.subspace.training.exchange import (
    Exchange,
    LocalShards,
    OneProcess,
    Replicate,
    Shard,
)
from lightning_twa.subspace.training.optimizer import SubspaceOptimizer
from lightning_twa.subspace.training.parametrizations import kept_by_mask
from lightning_twa.subspace.training.solvers import FullMatrixAdam

__all__ = [
    "Exchange",
    "FullMatrixAdam",
    "LocalShards",
    "OneProcess",
    "Replicate",
    "Shard",
    "SubspaceOptimizer",
    "kept_by_mask",
]
