"""Strategies and other averaging callbacks: supported, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import TWACallback
from helpers.runs import fit_fails
from lightning_twa import StorageConfig

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


UNSUPPORTED = (
    "TWACallback does not support {}. Use one device, strategy='ddp', or FSDP2 (supported: "
    "SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)."
)


REASONS = {
    "FSDPStrategy": "it flattens parameters; FSDP2 in ModelParallelStrategy does not",
    "DeepSpeedStrategy": "its engine steps an optimizer of its own",
}


@pytest.mark.parametrize("name", [*REASONS, "SingleDeviceXLAStrategy"])
def test_a_strategy_that_is_not_supported_is_named(tmp_path, name) -> None:
    # the real ones need hardware or packages that this machine lacks; the check goes by name
    assert hasattr(L.pytorch.strategies, name)
    single = "SingleDevice" in name
    unsupported = type(name, (SingleDeviceStrategy if single else Strategy,), {})
    unsupported.__abstractmethods__ = frozenset()
    the_trainer = trainer(tmp_path)
    message = UNSUPPORTED.format(f"{name}: {REASONS[name]}" if name in REASONS else name)
    the_trainer._accelerator_connector.strategy = unsupported(*[torch.device("cpu")] * single)
    module = Regressor()
    before = weights(module)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(start_epoch=4).setup(the_trainer, module, "fit")
    assert torch.equal(weights(module), before)


def test_an_unsupported_strategy_fails_in_fit(tmp_path) -> None:
    class OtherStrategy(Strategy):
        """One device, under a name that says nothing about what else it does."""

        root_device, is_global_zero = torch.device("cpu"), True
        reduce, all_gather = SingleDeviceStrategy.reduce, SingleDeviceStrategy.all_gather
        barrier, broadcast = SingleDeviceStrategy.barrier, SingleDeviceStrategy.broadcast

        def model_to_device(self) -> None: ...

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4),
        UNSUPPORTED.format("OtherStrategy"),
        strategy=OtherStrategy(),
    )


SHARDED = {
    "distribute='replicate' does not go with ModelParallelStrategy, which leaves each process a "
    "part": {"distribute": "replicate"},
    "StorageConfig(kind='memory') does not go with ModelParallelStrategy: a checkpoint holds the "
    "callback state of one process": {"storage": StorageConfig(kind="memory")},
}


@pytest.mark.parametrize("message", SHARDED)
def test_what_sharded_parameters_exclude(tmp_path, message) -> None:
    the_trainer = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TWACallback(**SHARDED[message]).setup(the_trainer, Regressor(), "fit")


def test_strategies_derived_from_a_supported_one_are_supported(tmp_path) -> None:
    class Mine(SingleDeviceStrategy):
        pass

    class MyDDP(DDPStrategy):
        pass

    twa = TWACallback(start_epoch=4)
    the_trainer = trainer(tmp_path, callbacks=[twa], strategy=Mine(torch.device("cpu")))
    the_trainer.fit(Regressor(), loader())
    assert twa.phase == "done"
    twa.setup(trainer(tmp_path, strategy=MyDDP()), Regressor(), "fit")


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_another_averaging_callback_in_the_run_is_refused(tmp_path: Path, name: str) -> None:
    from lightning.pytorch import callbacks

    kind = getattr(callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    other = kind(0.01) if name.startswith("Stochastic") else kind()
    the_trainer = trainer(tmp_path, callbacks=[TWACallback(start_epoch=4), other])
    with pytest.raises(ValueError, match="cannot be used in one run: both put an average"):
        the_trainer.fit(Regressor(), loader())
