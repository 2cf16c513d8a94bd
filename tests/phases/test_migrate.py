"""Modules that name, filter or convert their state in a way of their own: everything of a run goes
through their hooks, candidates and the raw weights too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from helpers.common import Regressor, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, run
from lightning_twa import SolverConfig, StorageConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:Found keys that are in the model"
)


class Renames(Regressor):
    """Its state has no prefix."""

    def state_dict(self, *args, **kwargs):
        found = super().state_dict(*args, **kwargs)
        return {name.removeprefix("net."): value for name, value in found.items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        named = {f"net.{name}": value for name, value in state_dict.items()}
        return super().load_state_dict(named, strict=strict)


class Counts(nn.Linear):
    """Has extra state."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class Extra(Regressor):
    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net[0] = Counts(6, 8)


class Filters(Regressor):
    """Saves what is trained."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.strict_loading = False
        self.backbone = nn.Linear(6, 6).requires_grad_(False)
        nn.init.eye_(self.backbone.weight)
        nn.init.zeros_(self.backbone.bias)

    def forward(self, x):
        return self.net(self.backbone(x))

    def on_save_checkpoint(self, checkpoint):
        held = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in held.items() if not n.startswith("backbone")}


class Halves(Regressor):
    """Its files are in half precision."""

    def on_save_checkpoint(self, checkpoint):
        held = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v.half() for n, v in held.items()}


def everything(module: nn.Module) -> dict[str, Any]:
    return {name: v.clone() for name, v in nn.Module.state_dict(module).items() if
            isinstance(v, torch.Tensor)}  # fmt: skip


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.seen[trainer.current_epoch] = everything(pl_module)


def twa(validate: bool, **kwargs: Any) -> TWACallback:
    arguments = {"start_epoch": 4, "collect": CollectConfig(start=0), **kwargs}
    return TWACallback(**arguments, validate_average=validate)


def fit(path: Path, module: L.LightningModule, *callbacks: L.Callback, ckpt_path: Any = None):
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    the_trainer = trainer(path, callbacks=list(callbacks), enable_checkpointing=saves)
    the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=ckpt_path)


def make(kind: type[L.LightningModule]) -> L.LightningModule:
    L.seed_everything(1, verbose=False)
    return kind()


@pytest.mark.matrix(3)
@pytest.mark.parametrize("kind", [Renames, Extra, Filters])
@pytest.mark.parametrize("validate", [True, False])
def test_the_average_has_the_names_of_the_module(tmp_path: Path, kind: Any, validate: bool) -> None:
    module, watch = make(kind), Watch()
    callback = twa(validate)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, module, callback, watch, saver)
    whole = everything(module)
    names = {n for n in module.state_dict() if not n.startswith("backbone")}
    for epoch in (2, 3, 4):
        held = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert held["state_dict"].keys() == names
        loaded = make(kind)
        loaded.load_state_dict(held["state_dict"], strict=loaded.strict_loading)
        assert equal(everything(loaded), watch.seen[epoch]), "what was validated"
        if validate and epoch < 4:
            assert held["current_model_state"].keys() == names
        again = make(kind)
        fit(tmp_path, again, twa(validate), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")  # fmt: skip
        assert equal(everything(again), whole), epoch
    assert callback.average_state_dict().keys() == everything_named(module)
    loaded = make(kind)
    loaded.load_state_dict(callback.average_state_dict(), strict=False)
    assert equal(everything(loaded), whole)
    loaded = kind.load_from_checkpoint(callback.average_path, weights_only=True)
    assert equal(everything(loaded), whole)


def everything_named(module: L.LightningModule) -> set[str]:
    return {name for name, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def test_the_average_keeps_its_precision_where_files_do_not(tmp_path: Path) -> None:
    module, callback = make(Halves), twa(False)
    fit(tmp_path, module, callback, ModelCheckpoint(tmp_path))
    assert equal(callback.average_state_dict(), everything(module))


class Plain(Regressor):
    """What the modules below were before; it learns nothing, so that numbers can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        """Every epoch has weights of its own."""
        if self.current_epoch < 4:
            with torch.no_grad():
                for p in self.parameters():
                    p.fill_(1.0 + self.current_epoch)
                self.scale.fill_(1.0 + self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Doubled(Plain):
    """Edits values, in a new tensor and in place."""

    def on_load_checkpoint(self, checkpoint):
        if checkpoint["hyper_parameters"].pop("old", True):
            held = checkpoint["state_dict"]
            held["net.0.weight"] = 2 * held["net.0.weight"]
            held["net.2.weight"].mul_(2)
            held["scale"] = 2 * held["scale"]


class Renamed(Plain):
    """The first layer was called otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.net[0]
        self.net = self.net[1:]

    def forward(self, x):
        return self.net(self.first(x))

    def training_step(self, batch, batch_idx):
        return 0 * (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def edit(self, held: Any) -> dict[str, Any]:
        names = {"net.0.weight": "first.weight", "net.0.bias": "first.bias"}
        return {names.get(name, name): value for name, value in held.items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = self.edit(checkpoint["state_dict"])


class RenamedByTorch(Renamed):
    """By a hook of torch's."""

    on_load_checkpoint = L.LightningModule.on_load_checkpoint

    def load_state_dict(self, state_dict, strict=True, assign=False):
        old = "net.0.weight" in state_dict
        return super().load_state_dict(self.edit(state_dict) if old else state_dict, strict=strict)


class Hyper(L.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["hyper_parameters"] = {"old": True}


STORAGES = [
    pytest.param(StorageConfig(kind="memory"), marks=pytest.mark.long, id="memory"),
    pytest.param(StorageConfig(kind="disk"), id="disk"),
]


@pytest.mark.matrix(5)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", [Doubled, Renamed, RenamedByTorch])
def test_candidates_and_weights_are_edited_as_the_state_is(
    tmp_path: Path, kind: Any, uniform: bool, validate: bool, storage: StorageConfig
) -> None:
    extra = {"solver": SolverConfig(name="uniform")} if uniform else {}
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    def callback() -> TWACallback:
        return twa(validate, storage=storage, **extra)

    fit(tmp_path, make(Plain), callback(), Hyper(), saver)
    for epoch in (2, 4):  # while collecting, in the phase
        module, again = make(kind), callback()
        seen: list[Any] = []

        class Seen(L.Callback):
            def on_train_start(self, trainer, pl_module, seen=seen):
                seen.append(everything(pl_module))

        module.on_train_epoch_start = lambda: None
        fit(tmp_path, module, again, Seen(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        factor = 2.0 if kind is Doubled else 1.0
        first = "net.0.weight" if kind is Doubled else "first.weight"
        if epoch == 2:
            assert float(seen[0][first].mean()) == factor * 3
            assert float(seen[0]["scale"].mean()) == factor * 3
        names = [f"epoch={e}" for e in range(epoch + 1)][:4]
        held = [c for c in again.candidates if c.name in names[: epoch + 1]]
        for candidate in held:
            number = 1.0 + int(candidate.name.split("=")[1])
            assert float(candidate.parameters[first].mean()) == factor * number
            assert set(candidate.parameters) == {n for n, _ in module.named_parameters()}
            assert float(candidate.buffers["scale"]) == factor * number
        assert len(held) >= 3
        mean = sum(float(c.parameters[first].mean()) for c in again.candidates)
        expected = mean / len(again.candidates)
        assert float(module.state_dict()[first].mean()) == pytest.approx(expected)


class Unknown(Renamed):
    """Edits names that it makes itself, so candidates do not have them."""

    def on_load_checkpoint(self, checkpoint):
        held = checkpoint["state_dict"]
        checkpoint["state_dict"] = self.edit({f"net.{name}": v for name, v in held.items()})
        checkpoint["state_dict"]["scale"] = checkpoint["state_dict"].pop("net.scale")


class Bare(Plain):
    def state_dict(self, *args, **kwargs):
        found = super().state_dict(*args, **kwargs)
        return {name.removeprefix("net."): value for name, value in found.items()}


def test_what_cannot_be_edited_is_named(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, make(Bare), twa(False), saver)
    module = make(Unknown)
    with pytest.raises(ValueError, match=r"no tensor 'first.weight', which the model has.*no tensor"
                       r" 'net.0.bias', which the candidate has.*Begin"):  # fmt: skip
        fit(tmp_path, module, twa(False), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert "on_load_checkpoint" not in vars(module), "nothing is left in the module"


def test_a_candidate_that_has_lost_a_tensor_is_damaged_and_not_filled_up(tmp_path) -> None:
    def make_twa() -> TWACallback:
        return TWACallback(4, collect=CollectConfig(start=1))

    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, Regressor, make_twa, saver=saver)
    (path,) = (tmp_path / "ck").glob("epoch=4-*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    candidate = checkpoint["callbacks"]["TWACallback"]["candidates"]["window"][2]
    del candidate["parameters"]["net.2.bias"]
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"'epoch=3' .* has no tensor 'net.2.bias'.* damaged"):
        run(tmp_path, Regressor, make_twa, tmp_path / "bad.ckpt")
