"""What tests of candidates share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from helpers.on_the_way import Late
from helpers.simulated import Simulated, There
from lightning_twa.candidates import copying, taking


@pytest.fixture(params=["late", "thread"])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    monkeypatch.setattr(copying, "PLAIN", (Tensor, nn.Parameter, There))
    if request.param == "late":
        monkeypatch.setattr(taking, "Background", Late)
    with Simulated() as simulated:
        yield simulated
