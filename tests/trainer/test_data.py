"""The phase's data: the training or validation data, or those of a hook."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from helpers.common import Regressor, loader, mse, regression_data, trainer, weights
from helpers.ddp import fit as fit_several
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import fit, fit_fails
from lightning_twa.trainer import shuffled

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class Counting(Regressor):
    """Remembers which samples training saw, by phase."""

    def __init__(self, twa: TWACallback, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.twa = [twa]  # in a list: not a submodule, not a hyperparameter
        self.seen: dict[str, list[torch.Tensor]] = {"collect": [], "optimize": [], "done": []}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.seen[self.twa[0].phase].append(batch[0])
        return super().training_step(batch, batch_idx)


def rows(batches: list[torch.Tensor]) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for batch in batches for row in batch}


def test_twa_v_trains_on_the_validation_data_in_random_order(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, data="val")
    module = Counting(twa)
    val = loader(33, seed=1)
    with pytest.warns(UserWarning, match="validation metrics are not held out") as caught:
        fit(tmp_path, twa, module, val=val)
    assert sum("not held out" in str(w.message) for w in caught) == 1
    tried = module.seen["collect"].pop(1)
    assert rows([tried]) <= rows([b[0] for b in val])
    assert rows(module.seen["collect"]) == rows([b[0] for b in loader()])
    seen = module.seen["optimize"]
    assert len(module.seen["collect"]) == 4 * 4
    # 33 samples in batches of 16: a last batch of one, on which BatchNorm cannot train, is dropped
    assert [len(b) for b in seen] == [16, 16, 16, 16]
    assert rows(seen) <= rows([b[0] for b in val])
    assert not torch.equal(seen[0], next(iter(val))[0]), "the order was not shuffled"
    assert not torch.equal(seen[0], seen[2]), "the order was the same in both epochs"


def test_twa_dataloader_hook_on_module(tmp_path) -> None:
    class WithHook(Counting):
        def twa_dataloader(self) -> DataLoader:
            return loader(20, 10, seed=5)

    twa = TWACallback(start_epoch=4, data="twa")
    module = WithHook(twa)
    fit(tmp_path, twa, module)
    assert rows(module.seen["optimize"]) == rows([b[0] for b in loader(20, 10, seed=5)])
    assert len(module.seen["optimize"]) == 4


def test_twa_dataloader_hook_on_datamodule(tmp_path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

        def twa_dataloader(self) -> DataLoader:
            return loader(20, 10, seed=5)

    twa = TWACallback(start_epoch=4, data="twa")
    module = Counting(twa)
    trainer(tmp_path, callbacks=[twa]).fit(module, datamodule=Data())
    assert rows(module.seen["optimize"]) == rows([b[0] for b in loader(20, 10, seed=5)])


class Stream(IterableDataset):
    """Batches of a data set without a length."""

    def __iter__(self):
        return iter(loader())


@pytest.mark.parametrize("batchnorm", [False, True])
def test_iterable_data_without_a_length(tmp_path, batchnorm) -> None:
    twa = TWACallback(start_epoch=4)
    stream = DataLoader(Stream(), batch_size=None)
    _, recorder, _ = fit(tmp_path, twa, Regressor(batchnorm), train=stream)
    assert twa.phase == "done"
    assert len(recorder.steps) == 6 * 4
    assert recorder.steps[-1][0] == "done"


@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor")
@pytest.mark.filterwarnings("ignore:Found .dataloader_iter. argument in the .training_step.")
def test_training_step_that_takes_the_iterator(tmp_path) -> None:
    class Takes(Regressor):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:
            batch, _, _ = next(dataloader_iter)
            return mse(self.net(batch[0]), batch[1])

    twa = TWACallback(start_epoch=4)
    fit(tmp_path, twa, Takes())
    assert twa.phase == "done"


def test_persistent_workers_and_validation_within_an_epoch(tmp_path) -> None:
    from torch.utils.data import DataLoader

    results = []
    for workers in (0, 1):
        L.seed_everything(4, verbose=False)
        train = DataLoader(
            regression_data(), 16, num_workers=workers, persistent_workers=workers > 0
        )
        twa = TWACallback(start_epoch=3, validate_average=True, collect=CollectConfig(start=0))
        module = Regressor(batchnorm=True)
        the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=4, val_check_interval=2)
        the_trainer.fit(module, train, loader(32, seed=1))
        results.append(weights(module))
    assert torch.equal(*results)


def test_twa_v_without_validation_data(tmp_path) -> None:
    message = (
        "TWACallback(data='val') trains the coefficients on the validation data, but there is "
        "none. Pass val_dataloaders to fit, define val_dataloader(), or use data='train'."
    )
    fit_fails(tmp_path, TWACallback(start_epoch=4, data="val"), message)


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.parametrize("kind", [list, tuple, dict])
@pytest.mark.parametrize("count", [0, 2])
def test_twa_v_needs_one_validation_dataloader(tmp_path, kind, count) -> None:
    loaders = [loader(32, seed=1)] * count
    val = dict(enumerate(loaders)) if kind is dict else kind(loaders)

    class Several(Regressor):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

        def val_dataloader(self) -> Any:
            return val

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, data="val"),
        f"TWACallback(data='val') needs one validation dataloader, but there are {count}. Return "
        f"the one to use from a twa_dataloader() hook and pass data='twa'.",
        module=Several(),
    )


@pytest.mark.parametrize("kind", [list, dict])
def test_twa_v_with_one_dataloader_in_a_collection_works(tmp_path, kind) -> None:
    val = [loader(32, seed=1)] if kind is list else {"a": loader(32, seed=1)}
    twa = TWACallback(start_epoch=4, data="val")
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader(), val)
    assert twa.phase == "done"


NO_HOOK = (
    "TWACallback(data='twa') needs a twa_dataloader() hook on the LightningModule or "
    "LightningDataModule, but neither has one or it returned None. Define it, or use data='train' "
    "or data='val'."
)


@pytest.mark.parametrize("returns_none", [False, True])
@pytest.mark.parametrize("datamodule", [False, True])
def test_twa_data_without_a_hook(tmp_path, returns_none, datamodule) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

    module = Regressor()
    data = Data() if datamodule else None
    if returns_none:
        (data or module).twa_dataloader = lambda: None
    the_trainer = trainer(tmp_path, callbacks=[TWACallback(start_epoch=4, data="twa")])
    before = weights(module)
    with pytest.raises(ValueError, match=f"^{re.escape(NO_HOOK)}$"):
        the_trainer.fit(module, None if datamodule else loader(), datamodule=data)
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("owner", ["module", "datamodule", "both"])
def test_the_datamodule_s_hook_goes_before_the_module_s(tmp_path, owner) -> None:
    calls: list[str] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

    def hook(name: str) -> Any:
        def twa_dataloader() -> DataLoader:
            calls.append(name)
            return loader(32, seed=3)

        return twa_dataloader

    module, data = Regressor(), Data()
    if owner != "datamodule":
        module.twa_dataloader = hook("module")
    if owner != "module":
        data.twa_dataloader = hook("datamodule")
    twa = TWACallback(start_epoch=4, data="twa")
    trainer(tmp_path, callbacks=[twa]).fit(module, datamodule=data)
    assert calls == ["module" if owner == "module" else "datamodule"]
    assert twa.phase == "done"


def test_twa_v_warns_once_that_validation_is_not_held_out(tmp_path) -> None:
    message = (
        "TWACallback(data='val') trains the averaging coefficients on the validation data: from "
        "here on validation metrics are not held out. Judge the result on test data."
    )
    for data in ("train", "val"):
        twa = TWACallback(start_epoch=4, data=data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, callbacks=[twa], max_epochs=8).fit(
                Regressor(), loader(), loader(32, seed=1)
            )
        assert [str(w.message) for w in caught].count(message) == (data == "val")


@pytest.mark.parametrize(
    ("samples", "processes", "drop_last", "expected"),
    [
        (130, 1, False, [64, 64, 2]),
        (129, 1, False, [64, 64]),  # not the last one of one sample
        (130, 2, False, [64]),  # 65 each
        (129, 3, False, [43]),  # a process's only batch stays
        (129, 3, True, [43]),
        (130, 2, True, [64]),
        (256, 2, True, [64, 64]),
        (1, 1, True, [1]),
        (65, 1, True, [64]),
    ],
)
def test_every_process_has_a_batch_and_none_of_one_sample(
    samples, processes, drop_last, expected
) -> None:
    data = TensorDataset(torch.randn(samples, 3))
    found = shuffled(DataLoader(data, 64, drop_last=drop_last), processes)
    sampler = DistributedSampler(data, processes, 0, shuffle=True)
    own = DataLoader(data, found.batch_size, sampler=sampler, drop_last=found.drop_last)
    assert [len(batch) for (batch,) in own] == expected


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.parametrize(("samples", "steps"), [(34, 1), (33, 1), (30, 1)])
def test_two_processes_train_on_what_each_gets(tmp_path, samples, steps) -> None:
    """In batches of 16: 17 each, of which one would be alone, and 15 each."""
    twa = TWACallback(start_epoch=4, data="val", collect=CollectConfig(start=2))
    val = DataLoader(regression_data(samples, 1), 16, drop_last=samples == 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two = fit_several(tmp_path, twa, Regressor(batchnorm=True), val=val, max_epochs=5)
    for report in two:
        assert len([name for name, _ in report["steps"] if name != "collect"]) == steps
