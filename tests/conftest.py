"""Every test starts from a fixed random state, on one thread: results can be bitwise equal."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch

pytest.register_assert_rewrite("helpers")
# Lightning keeps messages to itself where nothing listens when it is imported, as in pytest 8.0.
logging.getLogger("lightning.pytorch").propagate = True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a ``matrix(n)`` the quick tests have ``n`` members, drawn by the name of the test: always
    the same, and of every axis. The others are ``long``.
    """
    members: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix") and not item.get_closest_marker("long"):
            members.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, found in members.items():
        kept = found[0].get_closest_marker("matrix").args[0]  # type: ignore[union-attr]
        if kept >= len(found):  # they were named on the command line
            continue
        drawn = random.Random(name.rpartition("::")[2]).sample(range(len(found)), kept)
        for i in set(range(len(found))) - set(drawn):
            found[i].add_marker("long")


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
