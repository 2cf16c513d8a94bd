"""The Trainer, the user's optimizer state and the weights survive the phase and every error."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.resume import equal
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import MeanMetric

from lightning_twa import CollectConfig, TWACallback


def snapshot(the_trainer: L.Trainer) -> dict[str, Any]:
    """What the phase changes, as the user had it."""
    strategy, loop = the_trainer.strategy, the_trainer.fit_loop
    return {
        "optimizers": list(map(id, strategy.optimizers)),
        "wrappers": [id(o._optimizer) for o in strategy._lightning_optimizers],
        "schedulers": [(id(c.scheduler), c.frequency) for c in strategy.lr_scheduler_configs],
        "source": id(loop._data_source.instance),
        "val_check_interval": the_trainer.val_check_interval,
        "accumulate": the_trainer.accumulate_grad_batches,
    }


class AtTheSwitch(L.Callback):
    """Before the switch: the Trainer and the states of the user's optimizer and scheduler."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 4:  # placed before the TWA callback
            self.trainer = snapshot(trainer)
            self.optimizer, self.scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
            self.states = self.now()

    def now(self) -> Any:
        return deepcopy((self.optimizer.state_dict(), self.scheduler.scheduler.state_dict()))


DATA = pytest.mark.parametrize(
    "data",
    [
        "train",
        pytest.param("val", marks=pytest.mark.filterwarnings("ignore:TWACallback.data='val'")),
    ],
)


@DATA
def test_fit_leaves_the_trainer_and_the_user_s_states_as_before_the_phase(tmp_path, data) -> None:
    before = AtTheSwitch()
    twa = TWACallback(start_epoch=4, data=data)
    the_trainer = trainer(tmp_path, callbacks=[before, twa], val_check_interval=3)
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert snapshot(the_trainer) == before.trainer
    assert equal(before.now(), before.states)
    assert the_trainer.train_dataloader.dataset is not None
    assert the_trainer.num_training_batches == 4


class Fails(Regressor):
    """Raises in the phase, in training or in validation."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        super().__init__(batchnorm=True)
        self.where, self.error = where, error

    def _maybe(self, where: str) -> None:
        if self.where == where and not self.trainer.sanity_checking:
            epoch = 5 if self.trainer.max_epochs == 6 else 2
            if self.trainer.current_epoch == epoch:
                raise self.error("planned")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._maybe("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._maybe("validation")
        super().validation_step(batch, batch_idx)


@DATA
@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_phase_gives_the_trainer_back(tmp_path, data, where, error) -> None:
    before = AtTheSwitch()
    twa = TWACallback(start_epoch=4, data=data)
    recorder = Recorder(twa)
    the_trainer = trainer(tmp_path, callbacks=[before, twa, recorder], val_check_interval=3)
    raised = SystemExit if error is KeyboardInterrupt else error
    module = Fails(where, error)
    with pytest.raises(raised):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert snapshot(the_trainer) == before.trainer
    assert equal(before.now(), before.states)
    assert recorder.steps[-1][0] in ("optimize", "done")
    assert torch.equal(weights(module), recorder.steps[-1][1]), "the last average stays in place"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_the_average_is_validated_gives_the_weights_back(
    tmp_path, error
) -> None:
    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.validated = weights(pl_module)

    watch = Watch()
    twa = TWACallback(start_epoch=8, validate_average=True, collect=CollectConfig(start=0))
    recorder = Recorder(twa)
    module = Fails("validation", error)
    the_trainer = trainer(tmp_path, callbacks=[twa, recorder, watch], max_epochs=10)
    raised = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(raised):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    average = (recorder.epochs[0] + recorder.epochs[1]) / 2
    torch.testing.assert_close(watch.validated, average, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights(module), recorder.steps[-1][1])


def test_an_exception_in_building_the_subspace_leaves_the_weights(tmp_path, monkeypatch) -> None:
    twa = TWACallback(start_epoch=4)
    recorder = Recorder(twa)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room for the basis")

    monkeypatch.setattr("lightning_twa.optimization.build_subspace", fail)
    module = Regressor()
    the_trainer = trainer(tmp_path, callbacks=[twa, recorder])
    with pytest.raises(MemoryError, match="no room"):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    assert torch.equal(weights(module), recorder.epochs[3])
    assert twa.num_candidates == 2


@pytest.mark.filterwarnings("ignore:.*The last model of the previous .fit. call will be used")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_checkpoint_on_exception_resumes(tmp_path) -> None:
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    twa = TWACallback(start_epoch=4)
    saver = OnExceptionCheckpoint(tmp_path)
    the_trainer = trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="planned"):
        the_trainer.fit(Fails("validation", ValueError), loader(), loader(32, seed=1))
    checkpoint = torch.load(saver.ckpt_path, weights_only=True)
    assert "momentum_buffer" in checkpoint["optimizer_states"][0]["state"][0], (
        "the user's SGD state"
    )
    resumed = TWACallback(start_epoch=4)
    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[resumed]).fit(
        module, loader(), loader(32, seed=1), ckpt_path=saver.ckpt_path
    )
    assert resumed.phase == "done"


# --- validation and BatchNorm


def test_validate_average_validates_it_and_restores_the_weights(tmp_path) -> None:
    class Watch(L.Callback):
        validated: torch.Tensor
        pairs: list[tuple[int, torch.Tensor, torch.Tensor]]

        def __init__(self) -> None:
            self.pairs = []

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.validated = weights(pl_module)

        def on_train_epoch_end(self, trainer, pl_module):
            self.pairs.append((trainer.current_epoch, self.validated, weights(pl_module)))

    watch = Watch()
    twa = TWACallback(start_epoch=4, validate_average=True, collect=CollectConfig(start=0))
    recorder = Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder, watch]).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    for epoch, validated, after in watch.pairs:
        assert torch.equal(after, recorder.epochs[epoch])
        if 0 < epoch < 4:
            expected = torch.stack([recorder.epochs[e] for e in range(epoch)]).mean(0)
            torch.testing.assert_close(validated, expected, rtol=1e-6, atol=1e-7)


class Augmented(Regressor):
    """Dropout, a metric and logging in ``training_step``: what re-estimation must not disturb."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net.append(nn.Dropout(0.0))
        self.mean_loss = MeanMetric()
        self.frozen_norm = nn.BatchNorm1d(6)

    def on_train_epoch_start(self) -> None:
        self.frozen_norm.eval()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step((self.frozen_norm(batch[0]), batch[1]), batch_idx)
        self.mean_loss(loss)
        self.log("mean_loss", self.mean_loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_stats = self.net[1].running_mean.clone(), self.net[1].running_var.clone()
        super().validation_step((self.frozen_norm(batch[0]), batch[1]), batch_idx)


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


def test_reestimation_sees_the_batches_as_training_does(tmp_path) -> None:
    class Shifted(Regressor):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (batch[0] + 10, batch[1]) if self.trainer.training else batch

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert batch[0].mean() > 5, "the batch was not augmented"
            return super().training_step(batch, batch_idx)

    twa = TWACallback(start_epoch=3, validate_average=True)
    trainer(tmp_path, callbacks=[twa], max_epochs=4).fit(
        Shifted(batchnorm=True), loader(), loader(32, seed=1)
    )
    assert twa.phase == "done"


@pytest.mark.parametrize("interval", [1.0, 2])
def test_reestimation_does_not_show_in_metrics_or_in_training(tmp_path, interval) -> None:
    results = []
    for validate_average in (False, True):
        L.seed_everything(4, verbose=False)
        twa = TWACallback(
            start_epoch=4, validate_average=validate_average, collect=CollectConfig(start=0)
        )
        recorder = Recorder(twa)

        class Logged(L.Callback):
            def __init__(self) -> None:
                self.values: list[float] = []

            def on_train_epoch_end(self, trainer, pl_module):
                self.values.append(float(pl_module.mean_loss.compute()))

        logged = Logged()
        the_trainer = trainer(
            tmp_path, callbacks=[twa, recorder, logged], val_check_interval=interval
        )
        the_trainer.fit(Augmented(), loader(), loader(32, seed=1))
        results.append((recorder.steps, logged.values, the_trainer.callback_metrics["mean_loss"]))
    (steps, values, last), (steps2, values2, last2) = results
    assert all(torch.equal(a[1], b[1]) for a, b in zip(steps, steps2, strict=True))
    assert values == values2
    assert torch.equal(last, last2)


def test_a_training_step_that_needs_gradients_keeps_the_average_with_a_warning(tmp_path) -> None:
    class Penalty(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = batch[0].requires_grad_()
            out = self.net(x)
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return (out - batch[1]).square().mean() + 1e-3 * gradient.square().mean()

    twa = TWACallback(start_epoch=4)
    recorder = Recorder(twa)
    module = Penalty(batchnorm=True)
    with pytest.warns(UserWarning, match="could not be re-estimated .*does not require grad"):
        trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert torch.equal(weights(module), recorder.steps[-1][1])
    assert module.net[1].momentum == 0.1
    assert module.net[1].running_var.min() > 0


def test_persistent_workers_and_validation_within_an_epoch(tmp_path) -> None:
    from helpers.common import regression_data
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
