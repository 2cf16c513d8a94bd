"""Work over the cores of a machine, with results that do not depend on how many there are."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from lightning_twa.machine.collectives import gather_objects, world_size

__all__ = ["full_precision", "in_order", "threads_here"]

Job = TypeVar("Job")
Room = TypeVar("Room")
Result = TypeVar("Result")

AHEAD = 2  # jobs a thread that are begun before their results are taken


def threads_here() -> int:
    """Threads that this process may use, of those of its cores that it shares with other processes
    of its group; every process calls it. No more than torch uses (``OMP_NUM_THREADS``).
    """
    threads = torch.get_num_threads()
    if world_size() == 1:
        return threads
    hosts = gather_objects(socket.gethostname())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(threads, (cores or 1) // hosts.count(socket.gethostname())))


def in_order(
    work: Callable[[Job, Room], Result],
    jobs: Iterable[Job],
    make_room: Callable[[], Room],
    threads: int,
) -> Iterator[Result]:
    """The results of jobs in their order, each computed by one thread alone, so that they are the
    same whatever the number of threads.

    Args:
        work: Of a job, with memory that no other job uses at the time.
        jobs: Taken a few at a time.
        make_room: Gives that memory, once for each thread.
        threads: How many work at a time; 1 is the caller's own.
    """
    with _one_thread():
        if threads <= 1:
            room = make_room()
            for job in jobs:
                yield work(job, room)
            return
        rooms: SimpleQueue[Room] = SimpleQueue()
        for _ in range(threads):
            rooms.put(make_room())

        def run(job: Job) -> Result:
            room = rooms.get()
            try:
                return work(job, room)
            finally:
                rooms.put(room)

        begun: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(threads, "twa") as pool:
            for job in jobs:
                begun.append(pool.submit(run, job))
                if len(begun) > AHEAD * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each operation of torch, also of threads that begin meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products on the CPU have the precision of float32, whatever a user allows elsewhere
    (``torch.set_float32_matmul_precision("medium")`` is bfloat16 on some processors).
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is not None and hasattr(matmul, "fp32_precision"):  # from torch 2.9 on
        before = matmul.fp32_precision
        if before in ("ieee", "none"):
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
