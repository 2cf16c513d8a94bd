"""Without held-out data: the loss on the same training batches before and after the phase."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helpers import ddp
from helpers.common import Regressor, loader, regression_data, trainer, weights
from helpers.plain import CollectConfig
from lightning_twa import TWACallback

NUMBERS = re.compile(
    r"Mean loss of training_step on (\d+) batch(?:es)? of the training data, in evaluation mode: "
    r"(\S+) (before the phase|when it was resumed), (\S+) after it\."
)


def fit(
    tmp_path: Path,
    caplog: Any,
    kind: Any = Regressor,
    heldout: Any = "auto",
    train: Any = None,
    **kwargs: Any,
) -> tuple[Any, TWACallback, str]:
    """A phase of forty batches, and what was said."""
    torch.manual_seed(0)
    caplog.clear()
    module = kind()
    twa = TWACallback(4, heldout=heldout, collect=CollectConfig(start=0))
    train = loader() if train is None else train
    options = {"callbacks": [twa], "max_epochs": 14, **kwargs}
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(tmp_path, **options).fit(module, train)
    return module, twa, caplog.text


@pytest.mark.parametrize("accumulated", [1, 3])
def test_losses_are_those_of_training_step_on_the_same_batches(
    tmp_path, caplog, accumulated
) -> None:
    module, twa, text = fit(tmp_path, caplog, accumulate_grad_batches=accumulated)
    x, y = (t.double() for t in regression_data().tensors)

    def loss(state: dict[str, Tensor]) -> float:
        a, b, c, d = (state[f"net.{name}"].double() for name in ("0.weight", "0.bias", *LAST))
        return float((torch.tanh(x @ a.T + b) @ c.T + d - y).square().mean())

    LAST = ("2.weight", "2.bias")
    mean = {
        n: sum(c.parameters[n].double() for c in twa.candidates) / twa.num_candidates
        for n in twa.candidates[0].parameters
    }
    (found,) = NUMBERS.findall(text)
    assert found[:1] + found[2:3] == ("4", "before the phase")  # all samples
    assert float(found[1]) == pytest.approx(loss(mean), rel=1e-3)
    assert float(found[3]) == pytest.approx(loss(module.state_dict()), rel=1e-3)
    assert float(found[3]) < float(found[1])


class Counting(Regressor):
    """With random numbers, buffers and logs that a pass would move."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        noise = torch.randn_like(batch[0]) / 10
        return super().training_step((batch[0] + noise, batch[1]), batch_idx)


def test_measuring_leaves_no_trace(tmp_path, caplog) -> None:
    measured, _, text = fit(tmp_path, caplog, Counting)
    assert NUMBERS.search(text)
    plain, _, text = fit(tmp_path, caplog, Counting, heldout=None)
    assert "No loss was compared (heldout=None)." in text
    assert not NUMBERS.search(text)
    assert torch.equal(weights(measured), weights(plain))
    ours, theirs = measured.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from regression_data()


class InTrainingOnly(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            raise KeyError("teacher")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train": DataLoader(Stream(), 16)}, "their samples cannot be chosen"),
        ({"kind": InTrainingOnly}, "measuring failed (KeyError: 'teacher')"),
    ],
)
def test_what_is_not_known_is_said(tmp_path, caplog, change, reason) -> None:
    _, twa, text = fit(tmp_path, caplog, **change)
    assert f"Whether the loss on the training data fell is not known: {reason}." in text
    assert twa.phase == "done"


def test_held_out_data_say_it_better(tmp_path, caplog) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(tmp_path, callbacks=[TWACallback(4)]).fit(Regressor(), loader(), loader(32, seed=1))
    assert "loss on the validation data" in caplog.text
    assert "Mean loss of training_step" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
def test_a_phase_that_goes_on_compares_with_where_it_did(tmp_path, caplog) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    twa = TWACallback(4, collect=CollectConfig(start=0))
    torch.manual_seed(0)
    options = {"max_epochs": 14, "enable_checkpointing": True, "callbacks": [twa, saver]}
    trainer(tmp_path, **options).fit(Regressor(), loader())
    caplog.clear()
    twa = TWACallback(4, collect=CollectConfig(start=0))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(tmp_path, max_epochs=14, callbacks=[twa]).fit(
            Regressor(), loader(), ckpt_path=tmp_path / "epoch=7.ckpt"
        )
    (found,) = NUMBERS.findall(caplog.text)
    assert found[2] == "when it was resumed"


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
def test_two_processes_say_each_line_once(tmp_path) -> None:
    logger = rank_zero.log
    handler = logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        twa = TWACallback(4, collect=CollectConfig(start=0))
        options = {"max_epochs": 14, "limit_val_batches": 0}
        first, second = ddp.fit(tmp_path / "run", twa, Regressor(), **options)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
    assert first["phase"] == second["phase"] == "done"
    text = (tmp_path / "log").read_text()
    for line in ("TWA: from epoch 4 only", "TWA: phase finished after 40", "TWA: Nothing was"):
        assert text.count(line) == 1
    (found,) = NUMBERS.findall(text)
    x, y = regression_data().tensors
    module = Regressor()
    module.load_state_dict(first["state"])
    assert found[0] == "8"  # of both processes
    with torch.no_grad():
        after = float((module.net(x) - y).square().mean())
    assert float(found[3]) == pytest.approx(after, rel=1e-3)
