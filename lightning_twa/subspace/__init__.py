"""The mathematics, in plain torch: usable in a hand-written training loop. It knows nothing of a
Trainer, of files, or of when a phase begins.
"""

from lightning_twa.subspace.build import build_subspace, restore_subspace
from lightning_twa.subspace.columns import Columns, cut_evenly, held_everywhere, held_locally
from lightning_twa.subspace.directions import stored_bytes
from lightning_twa.subspace.layout import ParameterLayout, TensorSpec
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.tensors import check_finite, in_float64, local_part, own_part, to_shards
from lightning_twa.subspace.training import (
    Exchange,
    FullMatrixAdam,
    LocalShards,
    OneProcess,
    Replicate,
    Shard,
    SubspaceOptimizer,
    kept_by_mask,
)

__all__ = [
    "Columns",
    "Exchange",
    "FullMatrixAdam",
    "LocalShards",
    "OneProcess",
    "ParameterLayout",
    "Replicate",
    "Shard",
    "Subspace",
    "SubspaceOptimizer",
    "TensorSpec",
    "build_subspace",
    "check_finite",
    "cut_evenly",
    "held_everywhere",
    "held_locally",
    "in_float64",
    "kept_by_mask",
    "local_part",
    "own_part",
    "restore_subspace",
    "stored_bytes",
    "to_shards",
]
