"""What the machine offers: messages between processes, memory, files, the terminal."""

from lightning_twa.machine.collectives import (
    CommonError,
    all_ranks,
    from_rank_,
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
from lightning_twa.machine.files import why_not_writable
from lightning_twa.machine.memory import free_bytes, total_bytes, unreserved_bytes
from lightning_twa.machine.terminal import say, warn
from lightning_twa.machine.threads import full_precision, in_order, threads_here

__all__ = [
    "CommonError",
    "all_ranks",
    "free_bytes",
    "from_rank_",
    "from_rank_zero",
    "from_rank_zero_",
    "full_precision",
    "gather_columns",
    "gather_objects",
    "in_common",
    "in_order",
    "mean_over_ranks_",
    "rank",
    "reduce_scatter_mean",
    "say",
    "sum_over_ranks",
    "threads_here",
    "total_bytes",
    "unreserved_bytes",
    "warn",
    "why_not_writable",
    "world_size",
]
