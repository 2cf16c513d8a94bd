"""What users do that nobody thought of, and what becomes of the average."""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from helpers.common import Regressor, loader, regression_data, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.recipes import KINDS, run, twa
from helpers.resume import equal, ordered, state
from lightning_twa import StorageConfig

# --- what else is in a checkpoint


class Own:
    """A class that no checkpoint reader knows."""


class Zipped(TorchCheckpointIO):
    """A format that is not torch's."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wb") as file:
            torch.save(checkpoint, file)


HYPERPARAMETERS = {
    "path": Path("somewhere"),
    "numpy": np.float64(1.0),
    "namespace": argparse.Namespace(a=1),
    "function": nn.functional.relu,
    "module": nn.Linear(2, 2),
    "object": Own(),
}


class WithHyperparameter(Regressor):
    def __init__(self, what: Any) -> None:
        super().__init__(batchnorm=True)
        self.save_hyperparameters({"what": what})


@pytest.mark.matrix(5)
@pytest.mark.filterwarnings("ignore:Attribute 'what' is an instance of")
@pytest.mark.parametrize("kind", ["default", "uniform"])
@pytest.mark.parametrize("what", HYPERPARAMETERS)
def test_any_hyperparameter_may_stand_beside_the_average(tmp_path, what, kind) -> None:
    callback, module = twa(kind), WithHyperparameter(HYPERPARAMETERS[what])
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run(tmp_path, callback, module, saver)
    assert callback.phase == "done"
    assert equal(callback.average_state_dict(), state(module))
    for name in ("twa.ckpt", "last.ckpt"):
        held = torch.load(tmp_path / name, weights_only=False)
        assert equal(dict(held["state_dict"]), state(module))
    assert len(pickle.dumps(callback)) < 50_000, "the weights are left to the file"


def test_a_format_of_a_plugin_s_own_keeps_the_average_in_memory(tmp_path) -> None:
    callback, module = twa(), Regressor()
    run(tmp_path, callback, module, ModelCheckpoint(tmp_path), plugins=[Zipped()])
    assert callback.average_path == str(tmp_path / "twa.ckpt")
    assert equal(callback.average_state_dict(), state(module))


@pytest.mark.parametrize("name", ["average", "a.safetensors", "a.ckpt.bak", ".hidden"])
def test_a_name_that_is_no_checkpoint_s_is_refused_at_once(name) -> None:
    with pytest.raises(ValueError, match=rf"save_average='{name}'.*end its name in one of \.ckpt"):
        TWACallback(save_average=name)


def test_a_long_name_is_written(tmp_path) -> None:
    callback = twa(save_average=tmp_path / f"{'a' * 240}.ckpt")
    run(tmp_path, callback, Regressor())
    assert callback.average_path == str(tmp_path / f"{'a' * 240}.ckpt")


def test_a_file_that_holds_another_run_s_average_by_now_is_not_ours(tmp_path) -> None:
    first, path = twa(save_average=tmp_path / "a.ckpt"), tmp_path / "a.ckpt"
    run(tmp_path, first, Regressor())
    path.unlink()
    run(tmp_path, twa(save_average=path), Regressor(lr=0.01))
    with pytest.raises(ValueError, match=r"a\.ckpt does not hold the average of this run any more"):
        first.average_state_dict()


@pytest.mark.parametrize("value", ["no", None, 2])
def test_validate_average_is_true_or_false(value) -> None:
    with pytest.raises(ValueError, match=f"Invalid validate_average={value!r}"):
        TWACallback(validate_average=value)


# --- somebody else's weights in the model


class Swaps(Regressor):
    """An EMA that the module itself puts in for validations."""

    def __init__(self) -> None:
        super().__init__()
        self.average: dict[str, Any] | None = None

    def on_train_batch_end(self, *args: Any) -> None:
        now = {n: p.detach().clone() for n, p in self.named_parameters()}
        old = self.average or now
        self.average = {n: 0.9 * old[n] + 0.1 * v for n, v in now.items()}

    def on_validation_start(self) -> None:
        self.kept = {n: p.detach().clone() for n, p in self.named_parameters()}
        for name, parameter in self.named_parameters():
            if self.average is not None:
                parameter.data.copy_(self.average[name])

    def on_validation_end(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.data.copy_(self.kept[name])


class Stops(L.Callback):
    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 4


class SavesIn(L.Callback):
    def __init__(self, hook: str, path: Path) -> None:
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore:TWACallback.validate_average=True. has put the average")
@pytest.mark.filterwarnings("ignore:At the end of the run the model does not hold")
@pytest.mark.parametrize("hook", ["on_validation_end", "on_validation_batch_end"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_while_others_have_weights_in_the_model_does_not_make_them_the_average(
    tmp_path, kind, hook
) -> None:
    averages = []
    for saves in (False, True):
        L.seed_everything(1, verbose=False)
        module, callback = Swaps(), twa(kind)
        others = [SavesIn(hook, tmp_path / "saved.ckpt")] if saves else []
        saver = ModelCheckpoint(tmp_path / "c", save_last=True, save_on_train_epoch_end=False)
        run(tmp_path, callback, module, Stops(), *others, saver, max_epochs=8)
        assert callback.phase == "done"
        averages.append((callback.average_state_dict(), state(module)))
    assert equal(averages[0], averages[1])
    assert equal(*averages[1]), "the model holds it"


def test_a_frozen_nan_is_nobody_else_s_weight(tmp_path) -> None:
    """What is saved at the end of the last validation is the result, at once."""
    callback, module = twa(), Regressor()
    module.unused = nn.Parameter(torch.full((3,), torch.nan), requires_grad=False)
    path = tmp_path / "saved.ckpt"
    run(tmp_path, callback, module, Stops(), SavesIn("on_validation_end", path), max_epochs=8)
    held = torch.load(path, weights_only=True)
    assert held["callbacks"][callback.state_key]["phase"] == "done"


def test_early_stopping_and_a_swap_in_the_module(tmp_path) -> None:
    """The recipe: stopping and saving at the end of a validation."""
    L.seed_everything(1, verbose=False)
    module, callback = Swaps(), twa("uniform")
    stopping = EarlyStopping("val_loss", patience=3, min_delta=9.0, check_on_train_epoch_end=False)
    saver = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, save_last=True, save_on_train_epoch_end=False
    )
    run(tmp_path, callback, module, stopping, saver, max_epochs=8)
    assert callback.phase == "done"
    assert equal(callback.average_state_dict(), state(module))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert equal(dict(last["state_dict"]), state(module))


# --- files and directories


@pytest.mark.parametrize("epoch", [1, 3, 4])
@pytest.mark.parametrize("kind", ["default", "uniform"])
def test_a_run_that_changes_its_directory_loses_nothing(tmp_path, monkeypatch, kind, epoch) -> None:
    class Moves(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == epoch:
                os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = StorageConfig(kind="disk", dirpath="candidates")
    callback = twa(kind, storage=storage, save_average="out/a.ckpt")
    module = Regressor()
    run(Path("."), callback, module, Moves(), enable_checkpointing=False)
    assert len(callback.candidate_names) == (3 if kind == "default" else 5)
    assert callback.average_path == str(tmp_path / "out" / "a.ckpt")
    assert equal(callback.average_state_dict(), state(module))
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_the_files_of_each_checkpoint_callback_stay(tmp_path) -> None:
    """Of two with different intervals, each keeps its own newest."""
    collect = CollectConfig(start=0, every_n_train_steps=1, max_candidates=2)
    storage = StorageConfig(kind="disk")

    def savers() -> list[ModelCheckpoint]:
        often = ModelCheckpoint(tmp_path, "a-{step}", every_n_train_steps=1, save_top_k=1)
        return [often, ModelCheckpoint(tmp_path, "b-{step}", every_n_train_steps=6, save_top_k=1)]

    class Crashes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 11:
                raise KeyError

    with pytest.raises(KeyError):
        run(tmp_path, twa(collect=collect, storage=storage), Regressor(), *savers(), Crashes())
    (older,) = tmp_path.glob("b-*.ckpt")
    callback = twa(collect=collect, storage=storage)
    the_trainer = trainer(tmp_path, callbacks=[callback, *savers()], enable_checkpointing=True)
    the_trainer.fit(Regressor(), ordered(), ordered(32, seed=1), ckpt_path=older)
    assert callback.phase == "done"


# --- copies and data


class Edits(Regressor):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = True


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_module_has_its_own_hooks(tmp_path, duplicate) -> None:
    copies: list[Any] = []

    class Copies(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            kept, pl_module._trainer = pl_module._trainer, None
            copies.append(duplicate(pl_module))
            pl_module._trainer = kept

    run(tmp_path, twa(), Edits(), Copies(), ModelCheckpoint(tmp_path, "a"))
    (twin,) = copies
    trainer(tmp_path).test(twin, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert twin.loaded


class RandomOrder(RandomSampler):
    """With a random state of numpy's."""

    def __init__(self, source: Any, made: Any) -> None:
        super().__init__(source)
        self.made = made

    def __iter__(self) -> Any:
        random = self.made
        shuffled = random.permutation(len(self.data_source)).tolist() if random else []
        return iter(shuffled)


ORDERS: dict[str, Any] = {
    "torch": lambda data: RandomSampler(data, generator=torch.Generator().manual_seed(1)),
    "numpy": lambda data: RandomOrder(data, np.random.default_rng(1)),
    "old numpy": lambda data: RandomOrder(data, np.random.RandomState(1)),
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_passes_for_statistics_do_not_move_random_orders_on(tmp_path, order, nested) -> None:
    finals = []
    for validate in (False, True):
        L.seed_everything(1, verbose=False)
        data = regression_data()
        sampler = ORDERS[order](data)
        train = (
            DataLoader(data, batch_sampler=BatchSampler(sampler, 16, False))
            if nested
            else DataLoader(data, 16, sampler=sampler)
        )
        module = Regressor(batchnorm=True)
        callback = twa(validate_average=validate)
        the_trainer = trainer(tmp_path, callbacks=[callback], max_epochs=5)
        the_trainer.fit(module, train, loader(32, seed=1))
        finals.append({n: p.detach().clone() for n, p in module.named_parameters()})
    assert equal(*finals)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_a_combined_loader_of_the_phase_s_own(tmp_path, mode) -> None:
    from lightning.pytorch.utilities import CombinedLoader

    class OfItsOwn(Regressor):
        def twa_dataloader(self) -> Any:
            return CombinedLoader([loader(32, seed=2)], mode)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0] if len(batch) == 1 else batch, batch_idx)

    callback = twa(data="twa")
    run(tmp_path, callback, OfItsOwn())
    assert callback.phase == "done"
