"""What the machine offers: messages between processes, memory."""

from lightning_twa.machine.collectives import (
    CommonError,
    all_ranks,
    from_rank_zero,
    from_rank_zero_,
    gather_columns,
    gather_objects,
    in_common,
    mean_over_ranks_,
    rank,
    reduce_scatter_mean,
    sum_over_ranks,
    world_size,
)
from lightning_twa.machine.memory import free_bytes

__all__ = [
    "CommonError",
    "all_ranks",
    "free_bytes",
    "from_rank_zero",
    "from_rank_zero_",
    "gather_columns",
    "gather_objects",
    "in_common",
    "mean_over_ranks_",
    "rank",
    "reduce_scatter_mean",
    "sum_over_ranks",
    "world_size",
]
