"""Buffers and parameters that come, go or grow in mid-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from helpers import ddp
from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, state
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "validated": {"validate_average": True},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "files": {"storage": StorageConfig(kind="disk")},
    "averages": {"collect": CollectConfig(start=0, ema_decays=(0.5,))},
    "cycles": {"start_epoch": 2, "cycles": 2},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "steps": {"collect": CollectConfig(start=0, every_n_train_steps=3)},
    "validated steps": {
        "collect": CollectConfig(start=0, every_n_train_steps=3),
        "validate_average": True,
    },
}


class Drifting(Regressor):
    """Changes its form in an epoch of its training."""

    def __init__(self, epoch: int = 2) -> None:
        super().__init__(batchnorm=True)
        self.epoch = epoch
        self.changes: list[Any] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.epoch:
            self.change()

    def change(self) -> None:
        raise NotImplementedError


class Bank(Drifting):
    """A memory bank that grows with every batch that is trained on, and its labels."""

    def __init__(self, epoch: int = 2) -> None:
        super().__init__(epoch)
        self.register_buffer("bank", torch.empty(0, 6))
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))

    def change(self) -> None: ...

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # not where statistics are made
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        self.bank = torch.cat([self.bank, torch.full((1, 6), float(step))])
        self.labels = torch.cat([self.labels, torch.tensor([step])])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("bank", "labels"):
            setattr(self, name, torch.empty_like(checkpoint["state_dict"][name]))


class GrowsInValidation(Bank):
    """What a validation adds, it also takes away from the weights that are trained on."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.bank = torch.cat([self.bank, torch.zeros(1, 6)])


class Comes(Drifting):
    def change(self) -> None:
        self.register_buffer("prototypes", torch.full((3,), 7.0))


class ComesBelow(Drifting):
    def change(self) -> None:
        self.net[0].register_buffer("prototypes", torch.full((3,), 7.0))


class Goes(Drifting):
    def __init__(self, epoch: int = 2) -> None:
        super().__init__(epoch)
        self.register_buffer("temporary", torch.zeros(3))

    def change(self) -> None:
        self.temporary = None


class IsDeleted(Goes):
    def change(self) -> None:
        del self.temporary


class ChangesDtype(Drifting):
    def __init__(self, epoch: int = 2) -> None:
        super().__init__(epoch)
        self.register_buffer("counts", torch.full((3,), 2.0))

    def change(self) -> None:
        self.counts = torch.full((3,), 5)


BUFFERS = [Bank, GrowsInValidation, Comes, ComesBelow, Goes, IsDeleted, ChangesDtype]


def twa(kind: str = "default") -> TWACallback:
    return TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})


def fit(path: Path, callback: TWACallback | None, module: L.LightningModule, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    module.load_state_dict({**module.state_dict(), **Regressor(batchnorm=True).state_dict()})
    callbacks = [] if callback is None else [callback]
    others = kwargs.pop("callbacks", [])
    the_trainer = trainer(path, callbacks=[*callbacks, *others], max_epochs=8)
    the_trainer.fit(module, ordered(), ordered(32, seed=1), **kwargs)
    return the_trainer


@pytest.mark.matrix(6)
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(m, k, marks=[] if k == "validated" or m is Bank else pytest.mark.long)
        for m in BUFFERS
        for k in KINDS
    ],
)
def test_a_buffer_that_drifts_has_its_newest_value(tmp_path, model, kind) -> None:
    callback, module, plain = twa(kind), model(), Regressor(batchnorm=True)
    fit(tmp_path / "a", callback, module)
    assert callback.phase == "done"
    expected = twa(kind)
    fit(tmp_path / "b", expected, plain)
    assert equal(callback.averaging_weights, expected.averaging_weights)
    held = state(module)
    assert equal({name: held[name] for name in plain.state_dict()}, state(plain))
    if isinstance(module, Bank):
        steps = [int(row[0]) for row in module.bank if row[0]]
        assert steps == module.labels.tolist() == list(range(1, 33))
    elif isinstance(module, Comes | ComesBelow):
        assert all(b.tolist() == [7.0] * 3 for n, b in module.named_buffers() if "proto" in n)
    elif isinstance(module, Goes):
        assert getattr(module, "temporary", None) is None
    else:
        assert module.counts.tolist() == [5, 5, 5]
    average = callback.average_state_dict()
    own = {name: value for name, value in module.state_dict().items() if name != "bank"}
    assert equal({name: average[name] for name in own}, own)


class Save(L.Callback):
    """Saves at the end of every validation, when the average may be in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("kind", ["default", "validated", "uniform"])
def test_a_resumed_run_has_the_bank_too(tmp_path: Path, kind: str) -> None:
    whole = Bank()
    fit(tmp_path / "a", twa(kind), whole, callbacks=[Save(tmp_path)])
    for epoch in (1, 3, 5):
        module = Bank()
        fit(tmp_path / "b", twa(kind), module, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert equal(state(module), state(whole)), epoch


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_end"])
def test_only_buffers_of_the_module_s_own_are_no_other_weights(
    tmp_path, hook, caplog, recwarn
) -> None:
    class Counts(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

    def count(self: Counts, *args: Any) -> None:
        getattr(Regressor, hook)(self, *args)
        self.seen += 1

    setattr(Counts, hook, count)
    caplog.set_level("INFO", "lightning.pytorch")
    fit_trainer = trainer(tmp_path, callbacks=[twa()], max_epochs=8)
    fit_trainer.fit(Counts(), loader(), loader(32, seed=1))
    assert "has the weights of the average, but 1 buffer with other values" in caplog.text
    assert "'seen'" in caplog.text
    assert not [w for w in recwarn if "does not hold the average" in str(w.message)]


# --- parameters


class ParameterComes(Drifting):
    def change(self) -> None:
        self.extra = nn.Linear(2, 3)


class ParameterGoes(Drifting):
    def __init__(self, epoch: int = 2) -> None:
        super().__init__(epoch)
        self.extra = nn.Linear(2, 3)

    def change(self) -> None:
        self.extra = None


class ParameterGrows(ParameterGoes):
    def change(self) -> None:
        self.extra = nn.Linear(2, 5)


class ParameterIsNone(ParameterGoes):
    def change(self) -> None:
        self.extra.weight = None


PARAMETERS = {
    ParameterComes: (r"none in candidate '{before}', shape \(3, 2\) {now}"),
    ParameterGoes: (r"shape \(3, 2\) in candidate '{before}', none {now}"),
    ParameterGrows: (r"shape \(3, 2\) in candidate '{before}', shape \(5, 2\) {now}"),
    ParameterIsNone: (r"shape \(3, 2\) in candidate '{before}', none {now}"),
}


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize(
    ("kind", "before", "now"),
    [
        ("default", "epoch=1", "at the end of epoch 2"),
        ("files", "epoch=1", "at the end of epoch 2"),
        ("validated", "epoch=1", "before a validation in epoch 2"),
        ("uniform", "epoch=1", "at the end of epoch 2"),
        ("steps", "step=6", "after step 9, in epoch 2"),
    ],
)
def test_a_parameter_that_drifts_is_refused_at_the_first_candidate_that_differs(
    tmp_path, model, kind, before, now
) -> None:
    module, callback = model(), twa(kind)
    expected = PARAMETERS[model].format(before=before, now=now)
    with pytest.raises(ValueError, match=f"Parameter 'extra.weight' .*: {expected}"):
        fit(tmp_path, callback, module)
    assert module.current_epoch == 2
    assert callback.candidate_names[-1] == before


def test_a_running_average_of_a_parameter_that_grows_is_refused(tmp_path: Path) -> None:
    message = r"Parameter 'extra.weight' .*: \(3, 2\) in the running average, \(5, 2\) now"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, twa("averages"), ParameterGrows())


def test_a_form_that_changes_before_collecting_is_none_of_the_callback_s_business(tmp_path) -> None:
    callback = TWACallback(4, collect=CollectConfig(start=2))
    module = ParameterGrows()
    fit(tmp_path, callback, module)
    assert callback.phase == "done"


# --- processes


class Uneven(Regressor):
    """Its second process has seen more."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.register_buffer("bank", torch.zeros(0))
        self.register_buffer("steps", torch.zeros(1))

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1
        self.bank = torch.cat([self.bank, torch.ones(1 + self.global_rank)])

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.bank = torch.empty_like(state_dict["bank"])  # to the main process
        return super().load_state_dict(state_dict, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.filterwarnings("ignore:.*broadcast_buffers. is deprecated")
@pytest.mark.parametrize(
    "kind", ["default", pytest.param("validated", marks=pytest.mark.long), "uniform"]
)
def test_every_process_keeps_a_buffer_of_its_own_form(tmp_path, kind) -> None:
    strategy = DDPStrategy(start_method="fork", broadcast_buffers=False)
    first, second = ddp.fit(tmp_path, twa(kind), Uneven(), strategy=strategy, max_epochs=6)
    assert (first["phase"], second["phase"]) == ("done", "done")
    assert [len(r["state"]["bank"]) for r in (first, second)] == [24, 48]
    for report in (first, second):
        del report["state"]["bank"]
    assert equal(first["state"], second["state"])
