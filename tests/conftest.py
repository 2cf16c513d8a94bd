"""Every test starts from a fixed random state, on one thread: results can be bitwise equal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch

pytest.register_assert_rewrite("helpers")


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A deadlock becomes a failure."""

    def fail(*args: Any) -> None:
        raise TimeoutError("the test takes too long: do processes wait for each other?")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
