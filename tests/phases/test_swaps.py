"""While an average is in the model for a validation: what is saved, what others do with the
weights, and what training goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from lightning_twa import SolverConfig, StorageConfig

HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "steps": {"collect": CollectConfig(start=0, every_n_train_steps=3)},
    "files": {"storage": StorageConfig(kind="disk")},
    "cycles": {"start_epoch": 2, "cycles": 2},
}


def validated(kind: str = "default") -> TWACallback:
    arguments = {"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]}
    return TWACallback(**arguments, validate_average=True)


class Save(L.Callback):
    """Saves in one hook of every validation, and notes what is in the model then and before."""

    def __init__(self, hook: str, path: Path, **kwargs: Any) -> None:
        self.raw: dict[str, Any] = {}
        self.seen: dict[int, dict[str, Any]] = {}
        self.trained: dict[int, dict[str, Any]] = {}

        def save(trainer: L.Trainer, module: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                epoch = trainer.current_epoch
                self.seen[epoch], self.trained[epoch] = state(module), self.raw
                trainer.save_checkpoint(path / f"{epoch}.ckpt", **kwargs)

        setattr(self, hook, save)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.raw = state(pl_module)


def fit(path: Path, twa: TWACallback, *others: L.Callback, first: bool = False, **kwargs: Any):
    L.seed_everything(1, verbose=False)
    module = kwargs.pop("module", None) or Regressor(batchnorm=True)
    callbacks = [*others, twa] if first else [twa, *others]
    ckpt_path = kwargs.pop("ckpt_path", None)
    the_trainer = trainer(path, callbacks=callbacks, max_epochs=8, **kwargs)
    the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=ckpt_path)
    return state(module), twa.averaging_weights, twa.candidate_names


@pytest.mark.matrix(3)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "kind", [k if k == "default" else pytest.param(k, marks=pytest.mark.long) for k in KINDS]
)
def test_a_save_while_the_average_is_in_place(
    tmp_path: Path, kind: str, first: bool, hook: str
) -> None:
    plain = fit(tmp_path, validated(kind))
    saver = Save(hook, tmp_path)
    whole = fit(tmp_path, validated(kind), saver, first=first)
    assert equal(whole, plain), "saving changes nothing"
    for epoch in (1, 2, 3, 5):
        held = torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)
        assert equal(dict(held["state_dict"]), saver.seen[epoch]), "what was validated"
        if "current_model_state" in held:
            assert equal(dict(held["current_model_state"]), saver.trained[epoch])
        resumed = fit(tmp_path, validated(kind), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert equal(resumed, whole), epoch


@pytest.mark.parametrize("kind", ["default", "uniform"])
def test_weights_alone_are_those_that_were_validated(tmp_path: Path, kind: str) -> None:
    saver = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_weights_only=True
    )
    between = Save("on_validation_start", tmp_path, weights_only=True)
    fit(tmp_path, validated(kind), between, saver, enable_checkpointing=True)
    for epoch in range(1, 8):
        for name in (f"epoch={epoch}.ckpt", f"{epoch}.ckpt"):
            held = torch.load(tmp_path / name, weights_only=True)
            assert equal(dict(held["state_dict"]), between.seen[epoch]), name
            assert "current_model_state" not in held


class Swap:
    """An exponential average that takes the weights' place for a validation, by copying or by
    exchanging the tensors.
    """

    def __init__(self, exchange: bool) -> None:
        self.exchange = exchange
        self.average: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}

    def follow(self, module: L.LightningModule) -> None:
        for name, p in module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(p.detach(), 0.1)
            else:
                self.average[name] = p.detach().clone()

    def put(self, module: L.LightningModule, values: dict[str, Any]) -> dict[str, Any]:
        before = {}
        for name, p in module.named_parameters():
            if name not in values:
                continue
            before[name] = p.data if self.exchange else p.detach().clone()
            if self.exchange:
                p.data = values[name]
            else:
                p.data.copy_(values[name])
        return before


class SwapCallback(Swap, L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        self.follow(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.kept = self.put(pl_module, self.average)

    def on_validation_end(self, trainer, pl_module):
        self.average = self.put(pl_module, self.kept)
        self.kept = {}


class SwapModule(Regressor):
    def __init__(self, exchange: bool) -> None:
        super().__init__(batchnorm=True)
        self.swap = [Swap(exchange)]

    def on_train_batch_end(self, *args):
        self.swap[0].follow(self)

    def on_validation_start(self):
        self.swap[0].kept = self.swap[0].put(self, self.swap[0].average)

    def on_validation_end(self):
        self.swap[0].average = self.swap[0].put(self, self.swap[0].kept)
        self.swap[0].kept = {}


class Steps(L.Callback):
    """The weights after every step of ordinary training."""

    def __init__(self) -> None:
        self.trained: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.trained.append(state(pl_module))


@pytest.mark.matrix(5)
@pytest.mark.filterwarnings("ignore:TWACallback.validate_average=True. has put")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("where", ["module", "before", "behind"])
@pytest.mark.parametrize("validate", [True, False])
def test_another_average_is_validated_too(
    tmp_path: Path, where: str, validate: bool, exchange: bool
) -> None:
    """Training goes on from the raw weights, and the run ends with the same average; BatchNorm
    statistics are its own, too.
    """

    def run(swap: bool) -> Any:
        twa = TWACallback(4, collect=CollectConfig(start=0), validate_average=validate and swap)
        steps = Steps()
        others = [steps, SwapCallback(exchange)] if swap and where != "module" else [steps]
        L.seed_everything(1, verbose=False)
        module = SwapModule(exchange) if swap and where == "module" else Regressor(batchnorm=True)
        return fit(tmp_path, twa, *others, first=where == "before", module=module), steps.trained

    plain, steps = run(swap=False)
    found, others = run(swap=True)
    assert equal(others, steps)
    assert equal(found, plain)


def test_who_validates_other_weights_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has put other weights there") as caught:
        fit(tmp_path, validated(), SwapCallback(False))
    assert sum("has put other weights" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:TWACallback.validate_average=True. has put")
def test_an_error_between_two_swaps_gives_the_raw_weights_back(
    tmp_path: Path, hook: str, first: bool
) -> None:
    class Fails(SwapCallback):
        pass

    def fail(self, trainer, pl_module):
        getattr(SwapCallback, hook)(self, trainer, pl_module)
        if trainer.current_epoch == 2 and not trainer.sanity_checking:
            raise ValueError("as planned")

    setattr(Fails, hook, fail)
    module, raw = Regressor(batchnorm=True), Save("on_fit_end", tmp_path)
    with pytest.raises(ValueError, match="as planned"):
        fit(tmp_path, validated(), raw, Fails(False), first=first, module=module)
    assert equal(state(module), raw.raw)


def test_nothing_is_left_around_a_validation(tmp_path: Path) -> None:
    the_trainer = trainer(tmp_path, callbacks=[validated()], max_epochs=8)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert "run" not in vars(the_trainer.fit_loop.epoch_loop.val_loop)
    assert "lightning_module_state_dict" not in vars(the_trainer.strategy)
