"""BatchNorm statistics, re-estimated for the average."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from helpers.common import Regressor, loader, mse, trainer
from helpers.modules import Augmented
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from helpers.runs import DATA
from lightning_twa import SolverConfig, StorageConfig
from lightning_twa.phases.batchnorm import reestimate, tracked_batch_norms


def norms() -> tuple[nn.Sequential, list[torch.Tensor]]:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5))
    batches = [2 * torch.randn(16, 3) + 1 for _ in range(6)]
    for batch in batches:
        net(batch)
    return net, batches


def forward(net: nn.Module, batches: list[torch.Tensor], step: Any) -> int:
    with torch.no_grad():
        for batch in batches:
            with step():
                net(batch)
    return len(batches)


def test_statistics_equal_torch_s_update_bn_and_a_float64_mean() -> None:
    net, batches = norms()
    layers = tracked_batch_norms(net, set(net.modules()))
    assert reestimate(layers, lambda step: forward(net, batches, step)) == 6
    found = [layer.running_mean.clone() for layer in layers]
    hidden = torch.stack([net[0](b).detach().double() for b in batches])
    torch.testing.assert_close(found[0].double(), hidden.mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layers[0].running_var.double(), hidden.var(dim=1).mean(0), rtol=1e-5, atol=1e-6
    )
    assert [layer.momentum for layer in layers] == [0.3, 0.1]
    update_bn(batches, net)
    for mean, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(mean, layer.running_mean, rtol=1e-6, atol=1e-7)


def test_without_batches_or_after_an_error_the_statistics_are_as_before() -> None:
    net, _ = norms()
    layers = tracked_batch_norms(net, set(net.modules()))
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def fail(step: Any) -> int:
        net(torch.randn(16, 3))
        raise RuntimeError("planned")

    assert reestimate(layers, lambda step: 0) == 0
    with pytest.raises(RuntimeError, match="planned"):
        reestimate(layers, fail)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [layer.momentum for layer in layers] == [0.3, 0.1]


def test_only_layers_that_training_updates_are_taken() -> None:
    net, _ = norms()
    net.append(nn.BatchNorm1d(5, track_running_stats=False))
    net[2].eval()
    training = {m for m in net.modules() if m.training}
    assert tracked_batch_norms(net, training) == [net[1]]


@pytest.mark.matrix(2)
@DATA
@pytest.mark.parametrize("validate_average", [False, True])
def test_batchnorm_is_reestimated_over_the_training_data_before_the_last_validation(
    tmp_path, data, validate_average
) -> None:
    twa = TWACallback(start_epoch=4, data=data, validate_average=validate_average)
    module = Augmented()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, monitor="val_loss")
    the_trainer = trainer(
        tmp_path, callbacks=[twa, checkpoint], enable_checkpointing=True, val_check_interval=2
    )
    the_trainer.fit(module, loader(), loader(32, seed=1))
    norm = module.net[1]
    inputs = [module.net[0](module.frozen_norm(x)).double().detach() for x, _ in loader()]
    mean = torch.stack([b.mean(0) for b in inputs]).mean(0)
    var = torch.stack([b.var(0) for b in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.val_stats[0], norm.running_mean), "the last validation saw others"
    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked) == 4
    assert torch.equal(module.frozen_norm.running_mean, torch.zeros(6)), "kept in evaluation mode"
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert equal(saved, dict(module.state_dict()))


# --- layers that training does not run


class WithJudge(Regressor):
    """Has a network with BatchNorm that only validation runs."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.judge = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))
        with torch.no_grad():
            self.judge(3 * torch.randn(64, 6) + 5)
        self.judge.requires_grad_(False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.judge(batch[0]) - self.net(batch[0])).square().mean())


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "validated": {"validate_average": True},
    "cycles": {"start_epoch": 2, "cycles": 2},
    "disk": {"storage": StorageConfig(kind="disk")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_training_does_not_run_keeps_its_statistics(tmp_path, kind) -> None:
    module = WithJudge()
    before = {k: v.clone() for k, v in module.judge.state_dict().items()}
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    trainer(tmp_path, callbacks=[twa], max_epochs=8).fit(module, loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert equal(dict(module.judge.state_dict()), before)
    assert int(module.net[1].num_batches_tracked) == 4, "the layer that training runs"


def test_a_layer_that_some_batches_run_has_statistics_of_those(tmp_path) -> None:
    class Sometimes(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = self.norm(batch[0]) if batch_idx % 2 else batch[0]
            return mse(self.net(x), batch[1])

    module = Sometimes()
    trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)]).fit(module, loader())
    means = [x.double().mean(0) for i, (x, _) in enumerate(loader()) if i % 2]
    torch.testing.assert_close(module.norm.running_mean.double(), sum(means) / 2)
    assert int(module.norm.num_batches_tracked) == 2


def test_a_layer_without_momentum_and_one_that_runs_twice() -> None:
    net = nn.ModuleList([nn.BatchNorm1d(3, momentum=0.0), nn.BatchNorm1d(3, momentum=0.3)])
    batches = [torch.randn(16, 3, dtype=torch.float64).float() + i for i in range(3)]
    layers = tracked_batch_norms(net, set(net.modules()))
    assert layers == [net[1]], "training does not update the other one"

    def twice(step: Any) -> int:
        for batch in batches:
            with step():
                net[1](batch)
                net[1](2 * batch)
        return 3

    assert reestimate(layers, twice) == 3
    mean = sum(1.5 * b.double().mean(0) for b in batches) / 3
    torch.testing.assert_close(net[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_scripted_layers_are_reestimated(momentum) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and some still use it
        net = torch.jit.script(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=momentum)))
    batches = [2 * torch.randn(16, 3) + 1 for _ in range(6)]
    layers = tracked_batch_norms(net, set(net.modules()))
    assert len(layers) == 1
    assert reestimate(layers, lambda step: forward(net, batches, step)) == 6
    hidden = torch.stack([net[0](b).detach().double() for b in batches])
    torch.testing.assert_close(
        layers[0].running_mean.double(), hidden.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        layers[0].running_var.double(), hidden.var(dim=1).mean(0), rtol=1e-4, atol=1e-5
    )


# --- validations in the phase


class Looks(L.Callback):
    """Compares the statistics in each validation with those of the weights it sees."""

    def __init__(self, twa: TWACallback, batches: int) -> None:
        self.twa, self.batches = twa, batches
        self.errors: list[tuple[str, float]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            norm, linear = pl_module.net[1], pl_module.net[0]
            inputs = [linear(x).detach().double() for x, _ in [*loader()][: self.batches]]
            mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
            error = float((norm.running_mean.double() - mean).abs().max())
            self.errors.append((self.twa.phase, error))


@pytest.mark.matrix(5)
@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.parametrize("often", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_validations_in_the_phase_see_statistics_of_the_weights(
    tmp_path, often, data, batches
) -> None:
    twa = TWACallback(4, data, CollectConfig(start=0), batchnorm_batches=batches)
    looks = Looks(twa, batches or 4)
    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[looks, twa], max_epochs=8, **often).fit(
        module, loader(), loader(64, seed=1)
    )
    found = [error for phase, error in looks.errors if phase != "collect"]
    if "val_check_interval" in often:  # too often to do it each time
        found = found[1::2]
    assert len(found) >= 2
    assert max(found) < 1e-6


def test_a_save_right_after_the_switch_has_statistics_of_the_average(tmp_path) -> None:
    twa = TWACallback(4, collect=CollectConfig(start=0))
    seen: list[float] = []

    class AtSwitch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 16:
                inputs = [pl_module.net[0](x).detach().double().mean(0) for x, _ in loader()]
                norm = pl_module.net[1]
                error = norm.running_mean.double() - sum(inputs) / 4
                seen.append(float(error.abs().max()))

    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[twa, AtSwitch()]).fit(module, loader(), loader(32, seed=1))
    assert len(seen) == 1
    assert seen[0] < 1e-6


@pytest.mark.parametrize(
    ("batches", "steps", "expected"), [(None, 32, 8), (None, 80, 20), (3, 32, 3)]
)
def test_a_short_phase_takes_few_batches_at_the_switch(tmp_path, batches, steps, expected) -> None:
    twa = TWACallback(phase_steps=steps, batchnorm_batches=batches)
    counts: list[int] = []

    class AtSwitch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if twa.phase == "optimize" and not counts:
                counts.append(int(pl_module.net[1].num_batches_tracked))

    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[twa, AtSwitch()], max_epochs=6).fit(
        module, loader(16 * 64), loader(32, seed=1)
    )
    assert counts == [expected]
    assert int(module.net[1].num_batches_tracked) == (batches or 64)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
def test_a_number_of_batches_that_is_none_is_refused(value) -> None:
    with pytest.raises(ValueError, match=f"Invalid batchnorm_batches={value!r}. Must be an int"):
        TWACallback(batchnorm_batches=value)


# --- hooks that change batches


class Normalises(L.Callback):
    """In place, as users do."""

    def __init__(self) -> None:
        self.calls = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        self.calls += 1
        batch[0].mul_(4).sub_(1)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *a: Any) -> None:
        batch[0].mul_(4).sub_(1)


class Normalising(Regressor):
    """Does it in the module's own hook."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(4).sub_(1)


class Counts(L.Callback):
    calls = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls += 1


def fresh(*args: Any, **kwargs: Any) -> DataLoader:
    """Lists of tensors of their own."""
    data = loader(*args, **kwargs)
    return DataLoader(data.dataset, batch_size=16)


@pytest.mark.matrix(8)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", [Normalises, Normalising])
def test_statistics_are_of_batches_as_training_has_them(tmp_path, who, kind, first) -> None:
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    L.seed_everything(1, verbose=False)
    others: list[L.Callback] = [Normalises()] if who is Normalises else []
    module = (Normalising if who is Normalising else Regressor)(batchnorm=True)
    callbacks = [*others, twa] if first else [twa, *others]
    trainer(tmp_path, callbacks=callbacks, max_epochs=8, limit_val_batches=0).fit(module, fresh())
    inputs = [module.net[0](4 * x - 1).detach().double() for x, _ in fresh()]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(module.net[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_change_no_batch_are_not_called_more_often(tmp_path, kind) -> None:
    twa = TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=0), **KINDS[kind]})
    counts = Counts()
    module = Regressor(batchnorm=True)
    the_trainer = trainer(tmp_path, callbacks=[counts, twa], max_epochs=8)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert counts.calls == 32
    assert "batch_to_device" not in vars(the_trainer.strategy)
