"""One batch of the phase's data goes through ``training_step`` in the first seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from helpers.common import Regressor, loader, mse, regression_data, trainer
from helpers.ddp import fit as fit_several
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class OfPairs(Regressor):
    """Takes two batches at once in training, and one in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return sum(mse(self.net(batch[key][0]), batch[key][1]) for key in ("a", "b"))

    def twa_dataloader(self) -> Any:
        return loader(32, seed=2)


@pytest.mark.parametrize("data", ["val", "twa"])
def test_data_that_training_step_cannot_take_fail_after_the_first_batch(tmp_path, data) -> None:
    module = OfPairs()
    with pytest.raises(ValueError, match=rf"cannot take .*data=.{data}.*TypeError.*twa_"):
        trainer(tmp_path, callbacks=[TWACallback(4, data)]).fit(
            module, {"a": loader(), "b": loader()}, loader(32, seed=1)
        )
    assert module.steps == 2


def test_the_same_data_as_training_are_not_tried(tmp_path) -> None:
    module = OfPairs()
    trainer(tmp_path, callbacks=[TWACallback(4)]).fit(module, {"a": loader(), "b": loader()})
    assert module.steps == 6 * 4


class Remembers(Regressor):
    """Everything that a step may leave behind."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.drop = nn.Dropout(0.3)
        self.metric = MeanMetric()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(0, 1))
        self.seen: list[tuple[bool, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        output = self.drop(self.net(x))
        torch.autograd.grad(output.sum(), x, retain_graph=True)  # needs gradients of its own
        self.count += 1
        self.bank = torch.cat([self.bank, output.detach()])[-50:]
        self.metric.update(output.detach())
        self.seen.append((self.training, float(self.count)))
        loss = mse(output, batch[1])
        self.log("train_loss", loss)
        return loss


class Logged(L.Callback):
    def __init__(self) -> None:
        self.values: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        metric = pl_module.metric
        self.values.append((state(pl_module), float(metric.compute()), metric._update_count))


@pytest.mark.parametrize("data", ["val", "twa"])
def test_it_leaves_nothing_behind(tmp_path, data, monkeypatch) -> None:
    outcomes = []
    for tries in (True, False):
        if not tries:
            name = "lightning_twa.phases.start.try_training_step"
            monkeypatch.setattr(name, lambda *args: None)
        L.seed_everything(1, verbose=False)
        module, logged = Remembers(), Logged()
        module.twa_dataloader = lambda: loader(32, seed=2)
        twa = TWACallback(4, data, CollectConfig(start=0))
        # of their own state of random numbers, and in workers that stay
        generator = torch.Generator().manual_seed(3)
        val = DataLoader(regression_data(32, 1), 16, shuffle=False, generator=generator)
        the_trainer = trainer(tmp_path, callbacks=[logged, twa], max_epochs=5)
        with pytest.warns(UserWarning, match="could not be re-estimated"):  # it needs gradients
            the_trainer.fit(module, loader(), val)
        outcomes.append((logged.values, state(module), generator.get_state()))
        assert all(training for training, _ in module.seen)
    assert len(outcomes[0][0]) == 4 * 4 + 2
    assert equal(*outcomes)


class Counted(Dataset):
    def __init__(self) -> None:
        self.data, self.taken = regression_data(32, 1), 0

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        self.taken += 1
        return self.data[index]


def test_one_batch_is_taken_once(tmp_path) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = True

    data = Counted()
    the_trainer = trainer(
        tmp_path, callbacks=[TWACallback(4, "val"), Stops()], num_sanity_val_steps=0
    )
    with pytest.warns(UserWarning, match="TWA never ran"):
        the_trainer.fit(Regressor(), loader(), DataLoader(data, 16))
    assert data.taken == 16 + 32, "tried, and validated at the end"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
def test_when_one_process_cannot_take_them_none_goes_on(tmp_path: Path) -> None:
    class Picky(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_rank == 1 and self.trainer.global_step == 1:
                raise KeyError("planned")
            return super().training_step(batch, batch_idx)

    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"cannot take a batch"):
        fit_several(tmp_path, TWACallback(4, "val"), Picky())
