"""Every test starts from a fixed random state, on one thread: results can be bitwise equal."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    yield
    torch.set_num_threads(threads)
