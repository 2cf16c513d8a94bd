"""What a phase has put into the model is written again only where somebody has changed it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.common import Regressor
from helpers.resume import differences, interrupted, run, twa
from lightning_twa import SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.phases.written import WrittenWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]

FOUR_BITS = {"subspace": SubspaceConfig(bits=4)}


def add_one(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1


def add_one_unseen(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data += 1  # of which no version tells


class Changed(Regressor):
    """Whose weights a hook changes between the beginning of a phase and its first batch."""

    change: Callable[[nn.Module], None] = add_one

    def on_train_start(self) -> None:
        if self.trainer.global_step > 0:
            type(self).change(self)


class ChangedUnseen(Changed):
    change = add_one_unseen


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which parameters were written."""
    found: list[int] = []
    write = SubspaceOptimizer.write_parameters

    def writing(self: SubspaceOptimizer) -> None:
        found.append(self.attempts)
        write(self)

    monkeypatch.setattr(SubspaceOptimizer, "write_parameters", writing)
    return found


@pytest.mark.parametrize("module", [Regressor, Changed, ChangedUnseen])
def test_they_are_written_once_unless_somebody_changes_them(
    tmp_path: Path, writes: list[int], module: type[Regressor]
) -> None:
    path = interrupted(tmp_path, 4, **FOUR_BITS)
    whole = run(tmp_path, Regressor, lambda: twa(**FOUR_BITS))
    writes.clear()
    found = run(tmp_path, module, lambda: twa(**FOUR_BITS), ckpt_path=path)
    assert not differences(whole, found)
    assert writes[: writes.index(5)].count(4) == (1 if module is Regressor else 2)


@pytest.mark.parametrize("bits", [4, 32])
def test_every_bit_counts(bits: int) -> None:
    """Where products are as fast as a comparison nobody looks."""
    models = [nn.Linear(300, 4), nn.Linear(300, 4)]
    members = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    subspace = build_subspace(members, SubspaceConfig(bits=bits))
    optimizer = SubspaceOptimizer(models[0].named_parameters(), subspace, total_steps=4)
    written = WrittenWeights(optimizer, torch.device("cpu"))
    assert written.stay() == (bits == 4)
    with torch.no_grad():
        models[0].bias[1] = 0.0
    written = WrittenWeights(optimizer, torch.device("cpu"))
    models[0].bias.data[1] = -0.0
    assert not written.stay()
