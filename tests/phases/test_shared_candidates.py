"""A checkpoint's candidates in memory are not copied once more on their way into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Regressor
from helpers.resume import differences, interrupted, run, twa
from lightning_twa.config import CollectConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def tensors(state: Any) -> set[int]:
    """Addresses of all tensors."""
    if isinstance(state, torch.Tensor):
        return {state.data_ptr()}
    values = state.values() if isinstance(state, dict) else state
    return set().union(*map(tensors, values)) if isinstance(state, (dict, list, tuple)) else set()


@pytest.mark.parametrize("epoch", [2, 4])
def test_only_what_changes_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """Running averages do; a run that is resumed equals one that was not interrupted."""
    options = {"collect": CollectConfig(start=1, ema_decays=[0.9])}
    whole = run(tmp_path, Regressor, lambda: twa(**options))
    path = interrupted(tmp_path, epoch, **options)
    read: list[dict[str, Any]] = []
    kind = type(twa())
    load = kind.load_state_dict

    def meet(self: Any, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        super(kind, self).on_load_checkpoint(trainer, module, checkpoint)
        read.append(checkpoint["callbacks"][self.state_key])

    def loading(self: Any, state: dict[str, Any]) -> None:
        read.append(state)
        load(self, state)

    monkeypatch.setattr(kind, "on_load_checkpoint", meet)
    monkeypatch.setattr(kind, "load_state_dict", loading)
    resumed = run(tmp_path, Regressor, lambda: twa(**options), ckpt_path=path)
    before, after = (state["candidates"] for state in read)
    for key in ("given", "window"):
        assert tensors(before[key]) == tensors(after[key])
    assert tensors(before["window"])
    others = [{k: v for k, v in s.items() if k not in ("given", "window")} for s in (before, after)]
    assert not tensors(others[0]) & tensors(others[1])
    assert not differences(whole, resumed)
