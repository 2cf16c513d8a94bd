"""The cases of Lightning's own tests of weight averaging and SWA, for this callback.

What they check: how often things are called, that the Trainer has its own again afterwards, that a
crashed run resumes, and that nothing large is copied.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset, RandomIterableDataset
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_twa
from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import EpochOrder, equal, state
from helpers.runs import is_borrowed
from lightning_twa import SolverConfig

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")

START, EPOCHS, BATCHES, ACCUMULATE = 4, 6, 5, 2
STEPS = 3  # optimizer steps an epoch: the last batch of an epoch always steps


class Fixed(RandomDataset):
    """Lightning's data for tests, the same whenever it is asked for."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size, generator=torch.Generator().manual_seed(length))


class Boring(BoringModel):
    """Lightning's model for tests, a little larger; crashes in an epoch if asked to."""

    def __init__(
        self, batchnorm: bool = True, interval: str = "epoch", crash_on_epoch: int | None = None
    ) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(32)] if batchnorm else []
        self.layer = nn.Sequential(nn.Linear(32, 32), *norm, nn.ReLU(), nn.Linear(32, 2))
        self.interval, self.crash_on_epoch = interval, crash_on_epoch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.crash_on_epoch is not None and self.trainer.current_epoch >= self.crash_on_epoch:
            raise RuntimeError("CRASH")
        return super().training_step(batch, batch_idx)

    def scheduler(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Fixed(32, 32), batch_size=4, sampler=EpochOrder(32))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Fixed(32, 16), batch_size=4, sampler=EpochOrder(16, seed=1))


class CustomScheduler(Boring):
    """A scheduler that Lightning's SWA lost on resume (its issue 11665)."""

    def scheduler(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))


class Streaming(Boring):
    """Data without a length."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomIterableDataset(32, 32), batch_size=4)


class Counting(lightning_twa.TWACallback):
    """Checks at every hook how often things have happened so far."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"start_epoch": START, "collect": CollectConfig(start=1), **kwargs})
        self.switches = 0
        self.finishes = 0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        run, tell = self._run, self._run.tell

        def counted(*args: Any) -> None:
            before = self.phase
            tell(*args)
            self.switches += (before, self.phase) == ("collect", "optimize")
            self.finishes += (before, self.phase) == ("optimize", "done")

        run.tell = counted

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        in_phase = trainer.current_epoch >= START
        assert self.phase == ("optimize" if in_phase else "collect")
        assert self.switches == int(in_phase)
        assert is_borrowed(trainer) == in_phase
        assert type(trainer.optimizers[0]) is torch.optim.SGD
        assert trainer.strategy._lightning_optimizers[0]._optimizer is trainer.optimizers[0]
        assert len(trainer.lr_scheduler_configs) == 1, "schedulers stay visible"

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_end(trainer, *args)
        epoch = trainer.current_epoch
        assert self.num_candidates == min(epoch, START - 1)
        assert self.finishes == int(epoch == EPOCHS - 1)
        if epoch >= START:
            taken = (epoch - START + 1) * STEPS
            assert self._run.optimization.optimizer.steps == taken
            assert self._run.optimization.optimizer.total_steps == (EPOCHS - START) * STEPS

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        assert self.finishes == 1
        assert self.phase == "done"
        assert trainer.accumulate_grad_batches == ACCUMULATE
        assert trainer.num_training_batches == BATCHES
        assert not is_borrowed(trainer)
        config = trainer.lr_scheduler_configs[0]
        assert config.frequency == 1
        assert config.interval == pl_module.interval
        assert config.scheduler.optimizer is trainer.optimizers[0]


def how(**kwargs: Any) -> dict[str, Any]:
    return {
        "max_epochs": EPOCHS,
        "limit_train_batches": BATCHES,
        "limit_val_batches": 0,
        "accumulate_grad_batches": ACCUMULATE,
        **kwargs,
    }


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("kind", [Boring, Streaming, CustomScheduler])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_counts_of_candidates_switches_steps_and_backward_passes(
    tmp_path, batchnorm, kind, interval
) -> None:
    twa, model = Counting(), kind(batchnorm, interval)
    the_trainer = trainer(tmp_path, callbacks=[twa], **how())
    with mock.patch.object(Strategy, "backward", wraps=the_trainer.strategy.backward) as backward:
        the_trainer.fit(model)
    assert backward.call_count == EPOCHS * BATCHES, "re-estimation must not go backward"
    assert the_trainer.lightning_module is model
    assert the_trainer.global_step == EPOCHS * STEPS
    scheduler = the_trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == START * (1 if interval == "epoch" else STEPS), "stopped there"


def test_the_state_before_a_fit() -> None:
    twa = TWACallback(start_epoch=3, data="val", validate_average=True)
    assert twa.phase == "collect"
    assert twa.num_candidates == 0
    assert twa.candidate_names == []
    assert twa.block_names == []
    assert twa.averaging_weights is None
    assert twa.state_dict() == {}


@pytest.mark.parametrize("start", [False, True])
def test_the_first_validation_comes_before_the_first_candidate(tmp_path, start) -> None:
    """Lightning's issue 21724: validation of an average of nothing."""
    twa = TWACallback(
        start_epoch=4, validate_average=True, collect=CollectConfig(start=2 if start else 0)
    )
    trainer(tmp_path, callbacks=[twa], val_check_interval=1, num_sanity_val_steps=2).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    assert twa.phase == "done"


# --- copies


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} was copied")


class FixedLoader(Uncopyable, DataLoader):
    pass


class FixedData(Uncopyable, L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return FixedLoader(loader().dataset, 16)

    def val_dataloader(self) -> DataLoader:
        return FixedLoader(loader(32, seed=1).dataset, 16)

    def twa_dataloader(self) -> DataLoader:
        return FixedLoader(loader(32, seed=2).dataset, 16)


class FixedModule(Uncopyable, Regressor):
    pass


class FixedTrainer(Uncopyable, L.Trainer):
    pass


@pytest.mark.parametrize("data", ["train", "val", "twa"])
def test_neither_trainer_nor_module_nor_data_is_copied(tmp_path, data) -> None:
    twa = TWACallback(start_epoch=4, data=data, validate_average=True)
    the_trainer = FixedTrainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=6,
        logger=False,
        callbacks=[twa],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    the_trainer.fit(FixedModule(batchnorm=True), datamodule=FixedData())
    assert twa.phase == "done"
    with pytest.raises(AssertionError, match="FixedTrainer was copied"):
        deepcopy(the_trainer)


def test_the_basis_is_freed_when_the_run_is_finished(tmp_path) -> None:
    import gc
    import weakref

    kept: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 4 and not kept:
                kept.append(weakref.ref(twa._run.optimization.optimizer.subspace))

    twa = TWACallback(start_epoch=4)
    trainer(tmp_path, callbacks=[twa, Watch()]).fit(Regressor(), loader())
    gc.collect()
    assert kept[0]() is None


@pytest.mark.filterwarnings("ignore:You are using .torch.load. with")  # torch 2.4, unpickling
def test_the_callback_can_be_pickled_and_copied_before_and_after_a_fit(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, solver=SolverConfig(radius=1.0))
    before = pickle.loads(pickle.dumps(twa))
    assert before.settings == twa.settings
    for callback in (twa, before, deepcopy(before)):
        L.seed_everything(3, verbose=False)
        trainer(tmp_path, callbacks=[callback]).fit(Regressor(), loader())
        assert torch.equal(callback.averaging_weights, twa.averaging_weights)
    after = pickle.loads(pickle.dumps(twa))
    assert after.phase == "done"
    assert equal(after.state_dict(), twa.state_dict())
    assert torch.equal(deepcopy(twa).averaging_weights, twa.averaging_weights)


# --- configure_model, lengths


class Late(Boring):
    """Has its layers only once the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.mark.parametrize("data", ["train", "val"])
def test_layers_that_configure_model_makes(tmp_path, data) -> None:
    twa, model = TWACallback(start_epoch=4, data=data), Late()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    kwargs = how(limit_val_batches=1.0, enable_checkpointing=True)
    trainer(tmp_path, callbacks=[twa, saver], **kwargs).fit(model)
    assert isinstance(model.layer, nn.Sequential)
    candidate = next(iter(twa._run.store)).parameters
    assert set(candidate) == {f"layer.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")}
    for epoch in (2, 4):
        resumed, again = Late(), TWACallback(start_epoch=4, data=data)
        other = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer(tmp_path, callbacks=[again, other], **kwargs).fit(
            resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
        )
        assert again.phase == "done"
        assert torch.equal(weights(resumed), weights(model))


def test_data_without_a_length_and_epochs_without_an_end(tmp_path) -> None:
    twa = TWACallback(start_epoch=2)
    the_trainer = trainer(tmp_path, callbacks=[twa], **how(max_epochs=-1, max_steps=4 * STEPS + 1))
    the_trainer.fit(Streaming())
    assert twa.phase == "done"
    assert the_trainer.global_step == 4 * STEPS + 1
    assert twa._run.optimization.started["epoch"] == 2


def test_a_stream_of_one_endless_epoch_never_reaches_the_phase_and_says_so(tmp_path) -> None:
    twa = TWACallback(start_epoch=1, collect=CollectConfig(every_n_train_steps=2))
    with pytest.warns(UserWarning, match="TWA never ran: training stopped after 1 epoch and 7"):
        trainer(tmp_path, callbacks=[twa], max_epochs=-1, max_steps=7).fit(Streaming())
    assert twa.candidate_names == ["step=2", "step=4", "step=6"]


# --- crash and resume, with the checkpoints that a Trainer writes by itself


@pytest.mark.matrix(3)
@pytest.mark.parametrize("kind", [Boring, CustomScheduler])
@pytest.mark.parametrize("crash_on_epoch", [1, 3, 4, 5])
@pytest.mark.parametrize("data", ["train", pytest.param("val", marks=pytest.mark.long)])
def test_a_crashed_run_resumes_and_ends_as_one_that_did_not(
    tmp_path, kind, crash_on_epoch, data
) -> None:
    def fit(model: Boring, twa: TWACallback, **kwargs: Any) -> None:
        the_trainer = trainer(
            tmp_path, callbacks=[twa], **how(enable_checkpointing=True, limit_val_batches=2)
        )
        the_trainer.fit(model, **kwargs)

    def make() -> TWACallback:
        return TWACallback(start_epoch=4, collect=CollectConfig(start=1), data=data)

    whole, start, first = kind(), kind(crash_on_epoch=crash_on_epoch), make()
    start.load_state_dict(whole.state_dict())
    fit(whole, first)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="CRASH"):
        fit(start, make())
    (path,) = (tmp_path / "checkpoints").iterdir()
    resumed, second = kind.load_from_checkpoint(path), make()
    fit(resumed, second, ckpt_path=path)
    assert second.phase == "done"
    assert equal(state(resumed), state(whole))
    assert equal(second.averaging_weights, first.averaging_weights)
