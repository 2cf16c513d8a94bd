"""Run a function in several processes, as a launcher outside of Lightning starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Call ``function(*args)`` in each of several forked processes with torchrun's environment."""
    context = torch.multiprocessing.start_processes(
        _work, (function, processes, free_port(), args), nprocs=processes, start_method="fork"
    )
    assert context is None


def torchrun_environment(rank: int, size: int, port: int) -> None:
    """Set what torchrun tells each process it starts on one node."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="False",
    )


def _work(rank: int, function: Callable[..., None], size: int, port: int, args: Any) -> None:
    torch.set_num_threads(1)
    torchrun_environment(rank, size, port)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # torch 2.4 may wait for ever for threads of who leaves first
        torch.distributed.destroy_process_group()
