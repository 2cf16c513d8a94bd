"""What is wrong is said early, by name, and leaves Trainer and weights as they were."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Recorder, Regressor, loader, regression_data, trainer, weights
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_twa import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig, TWACallback

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return iter(regression_data())


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=16)


def optimizer_classes(the_trainer: L.Trainer) -> list[str]:
    return [type(o).__name__ for o in the_trainer.optimizers]


def fit_fails(
    tmp_path,
    twa: TWACallback,
    message: str,
    module: L.LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    epochs_trained: int = 0,
    **kwargs: Any,
) -> None:
    """``fit`` raises a ValueError with exactly this message, having trained for no more than
    ``epochs_trained`` epochs; the same Trainer and module then train on without the callback.
    """
    module = module or Regressor()
    train = loader() if train is None else train
    before = weights(module)
    the_trainer = trainer(tmp_path, callbacks=[twa], **kwargs)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, train, val)
    assert the_trainer.current_epoch == epochs_trained
    if epochs_trained == 0:
        assert torch.equal(weights(module), before)
        assert the_trainer.global_step == 0
    assert twa.phase == "collect"
    assert twa.averaging_weights is None
    assert "SubspaceOptimizer" not in optimizer_classes(the_trainer)
    if not isinstance(the_trainer.strategy, SingleDeviceStrategy) or isinstance(module, Broken):
        return  # one that could not train without the callback either, or only on other hardware
    del the_trainer.callbacks[:]
    the_trainer.limit_val_batches = 0
    the_trainer.fit_loop.max_epochs = epochs_trained + 1
    the_trainer.fit(module, loader())
    assert the_trainer.current_epoch == epochs_trained + 1
    assert not torch.equal(weights(module), before)


class Broken(Regressor):
    """Whatever is wrong with it is wrong without the callback too."""


# --- the constructor


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, float("nan"), float("inf"), True, None, "4"])
def test_start_epoch_is_an_epoch_or_a_fraction(value) -> None:
    message = (
        f"Invalid start_epoch={value!r}. Must be an epoch (int >= 0) "
        f"or a fraction of max_epochs (float in [0, 1))."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(start_epoch=value)


@pytest.mark.parametrize("value", ["test", None, True])
def test_data_is_one_of_three(value) -> None:
    message = f"Invalid data={value!r}. Must be one of 'train', 'val', 'twa'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(data=value)


@pytest.mark.parametrize("basis", ["candidates", "orthonormal"])
def test_a_radius_needs_the_pca_basis(basis) -> None:
    message = (
        f"SubspaceConfig.basis='{basis}' needs SolverConfig.lr: only basis='pca' measures "
        f"coefficients in standard deviations, which SolverConfig.radius means."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(subspace=SubspaceConfig(basis=basis))
    TWACallback(subspace=SubspaceConfig(basis=basis), solver=SolverConfig(lr=0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CollectConfig(start=1.5),
            "Invalid CollectConfig.start=1.5. Must be an epoch (int >= 0) "
            "or a fraction of max_epochs (float in [0, 1)).",
        ),
        (
            lambda: CollectConfig(every_n_epochs=0),
            "Invalid CollectConfig.every_n_epochs=0. Must be an int >= 1.",
        ),
        (
            lambda: CollectConfig(every_n_train_steps=0),
            "Invalid CollectConfig.every_n_train_steps=0. Must be an int >= 1, or None "
            "(collect at epoch ends).",
        ),
        (
            lambda: CollectConfig(max_candidates=1),
            "Invalid CollectConfig.max_candidates=1. Must be an int >= 2, or None (keep all).",
        ),
        (
            lambda: CollectConfig(every_n_epochs=2, every_n_train_steps=5),
            "CollectConfig got every_n_epochs=2 and every_n_train_steps=5. Give one of them.",
        ),
        (
            lambda: SubspaceConfig(basis="svd"),
            "Invalid SubspaceConfig.basis='svd'. Must be one of 'pca', 'candidates', "
            "'orthonormal'.",
        ),
        (
            lambda: SubspaceConfig(blocks="layer"),
            "Invalid SubspaceConfig.blocks='layer'. Must be 'global', 'tensor', or an int >= 1, "
            "the minimum number of elements per block.",
        ),
        (
            lambda: SubspaceConfig(rank=0),
            "Invalid SubspaceConfig.rank=0. Must be an int >= 1, or None (keep all directions).",
        ),
        (
            lambda: SubspaceConfig(rank=2, basis="candidates"),
            "SubspaceConfig.rank=2 needs basis='pca', where directions are ordered by variance, "
            "but basis='candidates'. Use CollectConfig.max_candidates to have fewer.",
        ),
        (
            lambda: SolverConfig(name="lbfgs"),
            "Invalid SolverConfig.name='lbfgs'. Must be one of 'full_matrix_adam', 'adamw', 'sgd', "
            "'uniform'.",
        ),
        (
            lambda: SolverConfig(schedule="poly"),
            "Invalid SolverConfig.schedule='poly'. Must be one of 'cosine', 'linear', 'step', "
            "'constant'.",
        ),
        (lambda: SolverConfig(lr=0.0), "Invalid SolverConfig.lr=0.0. Must be a number > 0."),
        (
            lambda: SolverConfig(radius=-1),
            "Invalid SolverConfig.radius=-1. Must be a number > 0.",
        ),
        (lambda: SolverConfig(warmup=1), "Invalid SolverConfig.warmup=1. Must be in [0, 1)."),
        (
            lambda: SolverConfig(weight_decay=-0.1),
            "Invalid SolverConfig.weight_decay=-0.1. Must be a number >= 0.",
        ),
        (
            lambda: SolverConfig(betas=(0.9, 1.0)),
            "Invalid SolverConfig.betas=(0.9, 1.0). Must be two numbers in [0, 1).",
        ),
        (
            lambda: SolverConfig(name="sgd"),
            "SolverConfig.name='sgd' needs lr: its step has the scale of the gradient, so a "
            "radius in standard deviations has no meaning. Pass lr=..., or use an Adam solver.",
        ),
        (
            lambda: SolverConfig(lr=0.1, radius=1.0),
            "SolverConfig got lr=0.1 and radius=1.0. Give one of them.",
        ),
        (
            lambda: SolverConfig(momentum=0.5),
            "SolverConfig.momentum=0.5 needs name='sgd', but name='full_matrix_adam'. Use betas.",
        ),
    ],
)
def test_a_setting_outside_its_range_is_named_with_the_range(make, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


# --- settings that do not fit the Trainer


@pytest.mark.parametrize(
    ("start_epoch", "max_epochs", "given"),
    [
        (6, 6, "start_epoch=6"),
        (7, 6, "start_epoch=7"),
        (1 - 1e-9, 6, "start_epoch=0.999999999 (epoch 6)"),
    ],
)
def test_a_phase_that_would_never_start(tmp_path, start_epoch, max_epochs, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=start_epoch),
        f"{given} must be below max_epochs=6: the phase trains the averaging coefficients in the "
        f"epochs from start_epoch on. Lower start_epoch or raise max_epochs.",
        max_epochs=max_epochs,
    )


@pytest.mark.parametrize(
    ("start_epoch", "given"),
    [(0, "start_epoch=0"), (0.0, "start_epoch=0.0"), (0.1, "start_epoch=0.1 (epoch 0)")],
)
def test_no_epoch_to_collect_in(tmp_path, start_epoch, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=start_epoch),
        f"{given} leaves no epoch to collect candidates in. Pass start_epoch >= 2 (1 with "
        f"CollectConfig.every_n_train_steps), or CollectConfig.checkpoints for a soup.",
    )


@pytest.mark.parametrize(
    ("start", "given"), [(4, "CollectConfig.start=4"), (0.7, "CollectConfig.start=0.7")]
)
def test_collecting_that_starts_after_the_switch(tmp_path, start, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, collect=CollectConfig(start=start)),
        f"{given} (epoch 4) must be below start_epoch=4: candidates are kept before the phase "
        f"starts.",
    )


TOO_FEW = (
    "TWA needs at least two candidates, but collecting {} gives {} before start_epoch={}. Start "
    "collecting earlier (CollectConfig.start), collect more often (every_n_epochs, "
    "every_n_train_steps), or raise start_epoch."
)


@pytest.mark.parametrize(
    ("start_epoch", "collect", "how", "count"),
    [
        (1, None, "every epoch of epochs 0 to 0", 1),
        (4, CollectConfig(start=3), "every epoch of epochs 3 to 3", 1),
        (4, CollectConfig(every_n_epochs=3), "every 3 epochs of epochs 0 to 3", 1),
        (4, CollectConfig(every_n_epochs=5), "every 5 epochs of epochs 0 to 3", 0),
    ],
)
def test_fewer_than_two_candidates_at_epoch_ends_is_found_in_setup(
    tmp_path, start_epoch, collect, how, count
) -> None:
    twa = TWACallback(start_epoch=start_epoch, collect=collect)
    fit_fails(tmp_path, twa, TOO_FEW.format(how, count, start_epoch))


@pytest.mark.parametrize(("every", "count"), [(9, 1), (17, 0)])
def test_fewer_than_two_candidates_by_steps_is_found_before_the_first_step(
    tmp_path, every, count
) -> None:
    collect = CollectConfig(start=0, every_n_train_steps=every)
    how = f"every {every} optimizer steps of epochs 0 to 3"
    fit_fails(tmp_path, TWACallback(start_epoch=4, collect=collect), TOO_FEW.format(how, count, 4))


def test_fewer_than_two_candidates_after_data_without_a_length_trains_on_with_a_warning(
    tmp_path,
) -> None:
    collect = CollectConfig(start=0, every_n_train_steps=100)
    twa = TWACallback(start_epoch=2, collect=collect, solver=SolverConfig(radius=1.0))
    module, recorder = Regressor(), Recorder(twa)
    message = (
        "TWA needs at least two candidates, but collecting every 100 optimizer steps of epochs 0 "
        "to 1 gave 0. Ordinary training goes on."
    )
    with pytest.warns(UserWarning, match="TWA") as caught:
        trainer(tmp_path, callbacks=[twa, recorder], max_epochs=4).fit(module, stream())
    texts = [str(w.message) for w in caught]
    assert texts.count(message) == 1
    (never,) = [text for text in texts if "TWA never ran" in text]
    assert never == (
        "TWA never ran: there were 0 candidates at start_epoch=2, and it needs two. The weights "
        "are those of ordinary training. Collect earlier, or more often (CollectConfig)."
    )
    assert len(recorder.steps) == 16
    assert torch.equal(weights(module), plain_weights(tmp_path, train=stream(), max_epochs=4))


def plain_weights(tmp_path, train: Any = None, **kwargs: Any) -> torch.Tensor:
    """The weights that the same run ends with when there is no callback of ours."""
    L.seed_everything(1, verbose=False)
    module = Regressor()
    trainer(tmp_path, **kwargs).fit(
        module, loader() if train is None else train, loader(32, seed=1)
    )
    return weights(module)


def test_a_fraction_of_epochs_needs_max_epochs(tmp_path) -> None:
    message = (
        "{}=0.5 is a fraction of max_epochs, but this Trainer has none (max_epochs=-1, or "
        "max_steps alone). Pass {} as an int, or set Trainer(max_epochs=...)."
    )
    name = "start_epoch"
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=0.5),
        message.format(name, name),
        max_epochs=-1,
        max_steps=12,
    )
    name = "CollectConfig.start"
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, collect=CollectConfig(start=0.5)),
        message.format(name, name),
        max_epochs=None,
        max_steps=20,
    )


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [(None, "cosine"), (SolverConfig(lr=0.1), "cosine"), (SolverConfig(schedule="constant"),) * 2],
)
def test_a_schedule_needs_a_length(tmp_path, solver, schedule) -> None:
    schedule = schedule if isinstance(schedule, str) else schedule.schedule
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, solver=solver),
        f"The length of the phase is not known (max_epochs=-1, max_steps=-1, data='train'), but "
        f"schedule='{schedule}' needs it. Set max_epochs or max_steps, or use "
        f"SolverConfig(schedule='constant', lr=...).",
        max_epochs=-1,
    )


@pytest.mark.parametrize("data", ["val", "twa"])
def test_a_schedule_needs_the_length_of_the_phase_s_own_data(tmp_path, data) -> None:
    class WithHook(Regressor):
        def twa_dataloader(self) -> DataLoader:
            return stream()

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, data=data),
        f"The length of the phase is not known (max_epochs=6, max_steps=-1, data='{data}'), but "
        f"schedule='cosine' needs it. Set max_steps (the data has no length), or use "
        f"SolverConfig(schedule='constant', lr=...).",
        module=WithHook(),
        val=stream(),
    )


# --- modules, optimizers, strategies


MANUAL = (
    "TWACallback needs automatic optimization: with automatic_optimization=False, and with "
    "several optimizers, the module steps its own optimizers and the phase could not replace them. "
    "Average the weights in your own loop with build_subspace() and SubspaceOptimizer."
)


class Manual(Regressor):
    """Steps its own optimizers."""

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if self.count > 1 else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(self.count)]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_is_refused(tmp_path, optimizers) -> None:
    fit_fails(tmp_path, TWACallback(start_epoch=4), MANUAL, module=Manual(optimizers))


def test_several_optimizers_with_automatic_optimization_are_refused_by_lightning(tmp_path) -> None:
    class Two(Regressor):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(2)]

    the_trainer = trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)])
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):
        the_trainer.fit(Two(), loader())


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize("value", [None, []])
def test_no_optimizer_is_refused(tmp_path, value) -> None:
    class NoOptimizer(Broken):
        def configure_optimizers(self) -> Any:
            return value

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4),
        "TWACallback needs exactly one optimizer, but configure_optimizers() gave 0.",
        module=NoOptimizer(),
    )


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


STORAGE = {
    "Invalid StorageConfig.kind='ram'. Must be one of 'auto', 'memory', 'disk'.": {"kind": "ram"},
    "Invalid StorageConfig.dtype='float16'. Must be one of 'float32', 'bfloat16'.": {
        "dtype": "float16"
    },
    "Invalid StorageConfig.dirpath=''. Must be a directory, or None (in the Trainer's": {
        "dirpath": ""
    },
    "Invalid StorageConfig.dirpath=3. Must be a directory": {"dirpath": 3},
    "StorageConfig.dirpath='x' needs kind='disk' or 'auto', but kind='memory' writes no files.": {
        "dirpath": "x",
        "kind": "memory",
    },
}


@pytest.mark.parametrize("message", STORAGE)
def test_storage_that_cannot_be(message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        StorageConfig(**STORAGE[message])


def test_distribute_must_be_one_of_three() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid distribute='rows'\. Must be one of 'auto', 'rep"
    ):
        TWACallback(distribute="rows")  # type: ignore[arg-type]


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


# --- data of the phase


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


# --- values


@pytest.mark.parametrize(
    ("value", "count", "words"),
    [
        (float("nan"), 1, "1 NaN or infinite value"),
        (float("-inf"), 3, "3 NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("by_steps", [False, True])
def test_a_candidate_that_is_not_finite_names_tensor_and_candidate(
    tmp_path, value, count, words, by_steps
) -> None:
    class Diverges(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 16:  # the last of epoch 3
                with torch.no_grad():
                    pl_module.net[0].weight.view(-1)[:count] = value

    collect = CollectConfig(start=2, every_n_train_steps=4 if by_steps else None)
    name = "step=16" if by_steps else "epoch=3"
    twa = TWACallback(start_epoch=4, collect=collect)
    the_trainer = trainer(tmp_path, callbacks=[Diverges(), twa])
    message = (
        f"Candidate '{name}', tensor 'net.0.weight', holds {words}: training has diverged. Lower "
        f"the learning rate, or clip gradients, before weights are averaged."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(Regressor(), loader())
    assert optimizer_classes(the_trainer) == ["SGD"]
    assert twa.candidate_names == (["step=12"] if by_steps else ["epoch=2"])


# --- runs that end before the phase, or go on after it


class StopAt(EarlyStopping):
    """Stops at the end of an epoch, whatever the metric."""

    def __init__(self, epoch: int) -> None:
        super().__init__("val_loss")
        self.epoch = epoch

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == self.epoch


NEVER_RAN = (
    "TWA never ran: training stopped after {} epochs and {} optimizer steps, before start_epoch=4 "
    "began the phase. The weights are those of ordinary training. Lower start_epoch to run it."
)


@pytest.mark.parametrize("epoch", [1, 3])
def test_early_stopping_before_the_phase_warns_and_leaves_the_weights(tmp_path, epoch) -> None:
    twa, module = TWACallback(start_epoch=4, validate_average=True), Regressor()
    message = NEVER_RAN.format(epoch + 1, 4 * (epoch + 1))
    the_trainer = trainer(tmp_path, callbacks=[twa, StopAt(epoch)])
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert twa.phase == "collect"
    assert twa.num_candidates == (2 if epoch == 3 else 0)
    assert torch.equal(weights(module), plain_weights(tmp_path, callbacks=[StopAt(epoch)]))
    assert optimizer_classes(the_trainer) == ["SGD"]


@pytest.mark.parametrize("steps", [7, 16])
def test_max_steps_before_the_phase_warns_and_leaves_the_weights(tmp_path, steps) -> None:
    twa, module = TWACallback(start_epoch=4), Regressor()
    last = -(-steps // 4) - 1
    early = (
        f"TWA will not run: max_steps={steps} ends the run in epoch {last}, before start_epoch=4 "
        f"begins the phase. Lower start_epoch to {last} or less, or raise max_steps."
    )
    with pytest.warns(UserWarning, match="^TWA") as caught:
        trainer(tmp_path, callbacks=[twa], max_steps=steps).fit(
            module, loader(), loader(32, seed=1)
        )
    messages = [str(w.message) for w in caught if "TWA" in str(w.message)]
    assert messages == [early, NEVER_RAN.format(last + 1, steps)]
    assert torch.equal(weights(module), plain_weights(tmp_path, max_steps=steps))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_finished_run_cannot_go_on(tmp_path) -> None:
    message = (
        "The TWA phase of this run was finished, but the Trainer goes on with epoch 6. To train "
        "further from the averaged weights, load them into a new run (load_from_checkpoint, a new "
        "Trainer and a new TWACallback)."
    )
    twa, module = TWACallback(start_epoch=4), Regressor()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    the_trainer = trainer(tmp_path, callbacks=[twa, checkpoint], enable_checkpointing=True)
    the_trainer.fit(module, loader())
    average, beta = weights(module), twa.averaging_weights
    the_trainer.fit_loop.max_epochs = 8
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        the_trainer.fit(module, loader())
    assert torch.equal(weights(module), average)
    assert torch.equal(twa.averaging_weights, beta)
    assert optimizer_classes(the_trainer) == ["SGD"]

    again, other = TWACallback(start_epoch=4), Regressor()
    resumed = trainer(tmp_path, callbacks=[again], max_epochs=8)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        resumed.fit(other, loader(), ckpt_path=checkpoint.last_model_path)
    assert torch.equal(weights(other), average)

    L.seed_everything(2, verbose=False)
    fresh = TWACallback(start_epoch=4)
    loaded = Regressor.load_from_checkpoint(checkpoint.last_model_path)
    trainer(tmp_path, callbacks=[fresh]).fit(loaded, loader())
    assert fresh.phase == "done"


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


@pytest.mark.parametrize("name", ["collect", "subspace", "solver"])
def test_a_configuration_of_another_class_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=3 must be a {name.capitalize()}Config"):
        TWACallback(**{name: 3})  # type: ignore[arg-type]


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


def test_a_complex_parameter_is_refused(tmp_path: Path) -> None:
    module = Regressor()
    module.phase_shift = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"cannot average 'phase_shift' of dtype torch\.complex64"):
        trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)]).fit(module, loader())
    module.phase_shift.requires_grad_(False)
    trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)]).fit(module, loader())


@pytest.mark.parametrize("device", ["gpu0", 3.5, "cuda:x"])
def test_a_device_that_torch_does_not_know_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid SubspaceConfig\.device=.* torch\.device takes"):
        SubspaceConfig(device=device)
