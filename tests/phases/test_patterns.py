"""CollectConfig(include=..., exclude=...): what is averaged, and what keeps its last weights."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_twa
from helpers.common import Regressor, loader, trainer, uniform
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from helpers.sharded import MARKS, Sharded
from helpers.sharded import fit as fit_sharded
from lightning_twa import SolverConfig, average

HEAD = {"net.3.weight", "net.3.bias"}

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


class Watch(L.Callback):
    """States of the module: after each step, at the end of training, and as it is validated."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.phases: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        (twa,) = [c for c in trainer.callbacks if isinstance(c, lightning_twa.TWACallback)]
        self.steps.append(state(pl_module))
        self.phases.append(twa.phase)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(state(pl_module))

    @property
    def last(self) -> dict[str, Tensor]:
        """What ordinary training ended with."""
        return self.steps[self.phases.index("optimize") - 1]


def fit(tmp_path: Path, twa: Any, module: Any = None, **kwargs: Any) -> tuple[Any, Watch]:
    torch.manual_seed(0)
    module, watch = module or Regressor(batchnorm=True), Watch()
    ckpt = kwargs.pop("ckpt_path", None)
    callbacks = [watch, twa, *kwargs.pop("callbacks", [])]
    the_trainer = trainer(tmp_path, callbacks=callbacks, **kwargs)
    the_trainer.fit(module, ordered(), loader(32, seed=1), ckpt_path=ckpt)
    return module, watch


def weighted(twa: Any) -> dict[str, Tensor]:
    """``sum beta w`` in float64, of one block."""
    beta = twa.averaging_weights[:, 0]
    states = [c.parameters for c in twa.candidates]
    return {n: sum(b * s[n].double() for b, s in zip(beta, states, strict=True)) for n in states[0]}


@pytest.mark.parametrize(
    "patterns", [{"exclude": "net.3"}, {"include": ["net.0", "net.1"]}, {"exclude": ["*.3.*"]}]
)
def test_what_is_left_out_keeps_its_last_weights(tmp_path, patterns, capsys) -> None:
    collect = lightning_twa.CollectConfig(start=1, ema_decays=(0.5,), **patterns)
    twa = TWACallback(4, collect=collect)
    module, watch = fit(tmp_path, twa)
    own = state(module)
    for name, value in weighted(twa).items():
        if name in HEAD:
            assert torch.equal(own[name], watch.last[name])
        else:
            torch.testing.assert_close(own[name].double(), value, rtol=1e-5, atol=1e-6)
            assert not torch.equal(own[name], watch.last[name])
    assert {"ema(0.5)", "power(0.13)", "mean"} <= set(twa.candidate_names)
    for candidate in twa.candidates:
        if "=" not in candidate.name:  # averages over steps are of the others only
            assert torch.equal(candidate.parameters["net.3.bias"], watch.last["net.3.bias"])


def test_the_report_says_how_many(tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, TWACallback(4, collect=CollectConfig(exclude="net.3")))
    assert (
        "TWA: 2 of 6 trained parameter tensors (9 of 81 numbers) are not averaged and keep their "
        "last weights (CollectConfig.include, exclude): net.3.weight, net.3.bias." in caplog.text
    )


def test_a_uniform_average_and_validations_of_it(tmp_path, caplog) -> None:
    collect = CollectConfig(start=2, exclude="net.3")
    twa = TWACallback(
        2, collect=collect, solver=SolverConfig(name="uniform"), validate_average=True
    )
    with caplog.at_level("INFO"):
        module, watch = fit(tmp_path, twa)
    own, mean = state(module), uniform([c.parameters for c in twa.candidates])
    for name, value in mean.items():
        expected = watch.steps[-1][name].double() if name in HEAD else value
        torch.testing.assert_close(own[name].double(), expected, rtol=1e-6, atol=1e-7)
    so_far = [c.parameters for c in twa.candidates][:2]  # of epoch 4 comes after its validation
    for name, value in uniform(so_far).items():
        expected = watch.steps[4 * 5 - 1][name].double() if name in HEAD else value
        torch.testing.assert_close(
            watch.validated[4][name].double(), expected, rtol=1e-6, atol=1e-7
        )
    assert "2 of 6 trained parameter tensors" in caplog.text


def test_a_failed_phase_leaves_it_too(tmp_path, monkeypatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("lightning_twa.phases.span.build_subspace", fails)
    with pytest.warns(UserWarning, match=r"no memory.*CollectConfig.*exclude=\('net.3',\)"):
        module, watch = fit(tmp_path, twa := TWACallback(4, collect=CollectConfig(exclude="net.3")))
    own, mean = state(module), uniform([c.parameters for c in twa.candidates])
    for name, value in mean.items():
        expected = watch.steps[15][name].double() if name in HEAD else value
        torch.testing.assert_close(own[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch) -> None:
    def made(exclude: Any = "net.3") -> Any:
        collect = lightning_twa.CollectConfig(start=0, ema_decays=(0.5,), exclude=exclude)
        return TWACallback(4, collect=collect)

    saver = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    whole, _ = fit(tmp_path, made(), callbacks=[saver], enable_checkpointing=True)
    path = str(tmp_path / "c" / f"epoch={epoch}.ckpt")
    resumed, _ = fit(tmp_path, made(), ckpt_path=path)
    assert equal(state(whole), state(resumed))
    message = (
        "The checkpoint's run averages CollectConfig(include=None, exclude=['net.3']), but this "
        "callback has include=None, exclude=[]. Resume with the same."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit(tmp_path, made(()), ckpt_path=path)


class Adapted(Regressor):
    """A frozen layer with a low-rank adapter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 6, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.base(batch[0]) + self.lora_B(self.lora_A(batch[0]))
        return (self.net(x) - batch[1]).square().mean()


def test_adapters_alone_beside_a_frozen_layer(tmp_path) -> None:
    twa = TWACallback(4, collect=CollectConfig(include="lora_*"))
    module, watch = fit(tmp_path, twa, Adapted())
    own, learned = state(module), weighted(twa)
    for name, value in own.items():
        if name.startswith("lora"):
            torch.testing.assert_close(value.double(), learned[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, watch.last[name])
        else:
            assert torch.equal(value, watch.last[name])


class Tied(Regressor):
    """Two names of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 1))
        self.net[2].weight = self.net[0].weight


def test_either_name_of_a_tied_tensor(tmp_path) -> None:
    twa = TWACallback(4, collect=CollectConfig(exclude="net.2.weight"))
    module, watch = fit(tmp_path, twa, Tied())
    assert torch.equal(module.net[0].weight, watch.last["net.0.weight"])
    assert not torch.equal(module.net[0].bias, watch.last["net.0.bias"])


def test_average_of_the_callback_goes_by_its_patterns(tmp_path) -> None:
    twa = TWACallback(4, collect=CollectConfig(exclude="net.3"))
    fit(tmp_path, twa)
    states = [c.parameters for c in twa.candidates]
    for options, kept in (({}, HEAD), ({"exclude": ()}, set())):
        for name, value in average(twa, **options).items():
            if name in states[0]:
                expected = states[-1][name].double() if name in kept else uniform(states)[name]
                torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_soup_takes_the_rest_from_its_newest_file(tmp_path) -> None:
    modules = [Regressor() for _ in range(3)]
    for i, module in enumerate(modules):
        torch.save(module.state_dict(), tmp_path / f"{i}.pt")
    collect = CollectConfig(checkpoints=str(tmp_path / "*.pt"), exclude="net.2")
    module, _ = fit(tmp_path, TWACallback(0, collect=collect), Regressor(), max_epochs=1)
    assert torch.equal(module.net[2].weight, modules[-1].net[2].weight)
    assert not torch.equal(module.net[0].weight, modules[-1].net[0].weight)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"exclude": "head"}, "CollectConfig.exclude='head' is the name of no parameter: there"),
        ({"include": ["net", "x.*"]}, "CollectConfig.include='x.*' is the name of no parameter"),
        (
            {"exclude": "net"},
            "CollectConfig(include=None, exclude=('net',)) leaves none of the 4 trained parameters",
        ),
    ],
)
def test_patterns_that_cannot_be_meant(tmp_path, patterns, message) -> None:
    module = Regressor()
    before = deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fit(tmp_path, TWACallback(4, collect=CollectConfig(**patterns)), module)
    assert equal(before, state(module))


@pytest.mark.parametrize("value", [3, "", [3], {"a": 1}])
def test_what_is_no_pattern(value) -> None:
    with pytest.raises(ValueError, match=r"^Invalid CollectConfig.exclude=.* Must be a pattern of"):
        CollectConfig(exclude=value)


class TestSharded:
    """FSDP2: each process has a part of every parameter."""

    pytestmark = MARKS

    def test_equals_one_process(self, tmp_path) -> None:
        options = {"collect": CollectConfig(start=0, ema_decays=(0.5,), exclude="net.2")}
        module = Sharded()
        (one,) = fit_sharded(tmp_path / "one", deepcopy(module), 1, options)
        several = fit_sharded(tmp_path / "several", module, 2, options)
        assert one["averaging_weights"].shape == several[0]["averaging_weights"].shape
        for (_, a), (_, b) in zip(one["steps"], several[0]["steps"], strict=True):
            assert float((a - b).norm() / a.norm()) < 1e-5
        # the last layer, 16 numbers at the end, stays where the phase began
        phases = [phase for phase, _ in one["steps"]]
        last = one["steps"][phases.index("optimize") - 1][1][-16:]
        for report in several:
            assert torch.equal(report["steps"][-1][1][-16:], several[0]["steps"][-1][1][-16:])
        assert float((several[0]["steps"][-1][1][-16:] - last).norm() / last.norm()) < 1e-5
