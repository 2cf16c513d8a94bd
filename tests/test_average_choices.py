"""What of candidates is averaged, and which: patterns of names, and a monitor's direction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from helpers.common import Regressor, loader, trainer
from lightning_twa import average
from lightning_twa.average.greedy import mode_of


def states(n: int = 3) -> list[dict[str, Tensor]]:
    """Of a model with a body and a head, with a counter."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "body.weight": torch.randn(4, 3, generator=generator),
            "body.bias": torch.randn(4, generator=generator),
            "body.count": torch.tensor(i),
            "head.weight": torch.randn(2, 4, generator=generator),
        }
        for i in range(n)
    ]


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("uniform", {}),
    ("ema", {"decay": 0.5}),
    ("wsm", {}),
    ("weights", {"weights": [0.5, 0.25, 0.25]}),
    ("model_stock", {"anchor": {n: torch.zeros_like(t) for n, t in states()[0].items()}}),
    ("greedy", {"score": lambda state: -float(state["body.weight"].norm())}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("patterns", [{"exclude": "head"}, {"include": ["body.*"]}])
def test_only_what_the_patterns_name_is_averaged(method, options, patterns) -> None:
    ms = states()
    whole = average(ms, method, **options)
    found = average(ms, method, **options, **patterns)
    for name in ("body.weight", "body.bias"):
        assert torch.equal(found[name], whole[name])
    assert torch.equal(found["head.weight"], ms[-1]["head.weight"])
    assert not torch.equal(whole["head.weight"], ms[-1]["head.weight"])
    assert list(found) == list(whole)


def test_weights_that_do_not_sum_to_one_leave_the_rest_alone() -> None:
    ms = states(2)
    with pytest.warns(UserWarning, match="sum to 2"):
        found = average(ms, "weights", weights=[1, 1], exclude="head")
    assert torch.equal(found["head.weight"], ms[-1]["head.weight"])
    torch.testing.assert_close(found["body.bias"], ms[0]["body.bias"] + ms[1]["body.bias"])


def test_what_is_not_averaged_may_have_another_form(tmp_path: Path) -> None:
    ms = states(2)
    ms[0]["head.weight"] = torch.zeros(7, 4)
    ms[0]["head.bias"] = torch.zeros(7)
    for i, state in enumerate(ms):
        torch.save(state, tmp_path / f"{i}.pt")
    with pytest.raises(ValueError, match=r"head\."):
        average(str(tmp_path / "*.pt"))
    found = average(str(tmp_path / "*.pt"), exclude="head")
    assert found.keys() == ms[1].keys()
    mean = (ms[0]["body.weight"].double() + ms[1]["body.weight"].double()) / 2
    torch.testing.assert_close(found["body.weight"].double(), mean, rtol=1e-6, atol=1e-7)


def test_tied_tensors_go_by_any_of_their_names() -> None:
    ms = [{"a": (t := torch.randn(3)), "b": t, "c": torch.randn(3)} for _ in range(2)]
    found = average(ms, exclude="b")
    assert torch.equal(found["a"], ms[1]["a"])
    assert torch.equal(found["b"], ms[1]["a"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": "tail"}, "include='tail' is the name of no tensor: Candidate 2 has body."),
        ({"include": "*", "exclude": "*"}, "include=('*',), exclude=('*',) leave no tensor"),
        ({"exclude": 3}, "Invalid exclude=3. Must be a pattern of names of parameters, such as"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        average(states(), **patterns)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        *((name, "max") for name in ("val_acc", "val/acc", "valAcc", "Accuracy", "val_acc_top5")),
        *((name, "max") for name in ("metrics/mAP50", "val_f1", "AUROC", "val-iou", "acc@1", "R2")),
        *((name, "min") for name in ("val_loss", "valLoss", "loss/dataloader_idx_0", "test.RMSE")),
        *((name, "min") for name in ("WER", "val_ppl", "error", "error_rate")),
    ],
)
def test_the_direction_is_that_of_the_name(monitor, mode) -> None:
    assert mode_of(monitor, None) == mode
    assert mode_of(monitor, "min") == "min"  # what is said counts


@pytest.mark.parametrize(
    "monitor", ["score", "val_x", "neg_loss", "acc_loss", "inverse_acc", "lossless", "top1_error"]
)
def test_a_direction_that_is_not_known_is_asked_for(monitor) -> None:
    with pytest.raises(ValueError, match=f"^mode is missing: the name of monitor='{monitor}' does"):
        mode_of(monitor, None)


class Scored(Regressor):
    """Logs how near its weights are to two: 1 is best, and the same as a distance."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        distance = sum((p - 2).abs().mean() for p in self.parameters())
        self.log("val_acc", 1 / (1 + distance))
        self.log("val_loss", distance)
        self.log("quality", distance)


def test_a_greedy_soup_without_mode_is_never_the_worst(tmp_path: Path) -> None:
    module = Scored()
    ms = [{n: torch.full_like(p, x) for n, p in module.named_parameters()} for x in (0, 2, 9)]
    the_trainer: L.Trainer = trainer(tmp_path)

    def soup(**kwargs: Any) -> float:
        options = {"module": module, "trainer": the_trainer, "dataloaders": loader(16)}
        state = average(ms, "greedy", **options, **kwargs)
        return float(nn.utils.parameters_to_vector(list(state.values())).mean())

    assert soup(monitor="val_acc") == 2.0
    assert soup(monitor="val_loss") == 2.0
    assert soup(monitor="quality", mode="min") == 2.0
    with pytest.raises(ValueError, match=r"^mode is missing: the name of monitor='quality' does"):
        soup(monitor="quality")
    with pytest.raises(
        ValueError, match=r"^Invalid mode='large'\. Must be one of 'min', 'max', or"
    ):
        soup(monitor="quality", mode="large")
