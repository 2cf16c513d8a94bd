"""The phase under the features of a Trainer: each means in the phase what it means in training."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.common import Recorder, Regressor, loader, mse, regression_data, trainer, weights
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    SubspaceOptimizer,
    TWACallback,
    build_subspace,
)


def fit(tmp_path, twa: TWACallback, module: L.LightningModule | None = None, **kwargs: Any):
    """Fit with the callback and a recorder; returns module, recorder, trainer."""
    module = module or Regressor()
    train = kwargs.pop("train") if "train" in kwargs else loader()
    val = kwargs.pop("val", loader(32, seed=1))
    recorder = Recorder(twa)
    callbacks = [twa, *kwargs.pop("callbacks", []), recorder]
    the_trainer = trainer(tmp_path, callbacks=callbacks, **kwargs)
    the_trainer.fit(module, train, val)
    return module, recorder, the_trainer


def hull_distance(points: list[torch.Tensor], theta: torch.Tensor) -> float:
    """Relative distance of theta from the affine hull of the points."""
    center = torch.stack(points).mean(0)
    span = torch.stack([p - center for p in points]).T
    solution = torch.linalg.lstsq(span, theta - center, driver="gelsd").solution
    return float((theta - center - span @ solution).norm() / theta.norm())


# --- what the phase is


def test_run_ends_with_the_learned_average_of_the_candidates(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    module, recorder, _ = fit(tmp_path, twa)
    assert twa.phase == "done"
    assert twa.candidate_names == ["epoch=2", "epoch=3"]
    beta = twa.averaging_weights
    assert beta.shape == (2, 1)
    assert beta.sum().item() == pytest.approx(1, abs=1e-12)
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    torch.testing.assert_close(weights(module), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(beta, torch.full_like(beta, 0.5)), "nothing was learned"


@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.parametrize("subspace", [SubspaceConfig(), SubspaceConfig(blocks="tensor")])
@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_weights_stay_in_the_affine_hull_after_every_step(tmp_path, data, subspace) -> None:
    twa = TWACallback(start_epoch=4, data=data, subspace=subspace, collect=CollectConfig(start=0))
    module, recorder, _ = fit(tmp_path, twa)
    points = [recorder.epochs[e] for e in range(4)]
    in_phase = [w for phase, w in recorder.steps if phase != "collect"]
    assert len(in_phase) == 2 * (4 if data == "train" else 2)
    if subspace.blocks == "global":
        assert max(hull_distance(points, w) for w in in_phase) < 1e-5
    else:  # each tensor in the hull of its own candidates
        sizes = [p.numel() for p in module.parameters()]
        for w in in_phase:
            for *pts, part in zip(*(p.split(sizes) for p in points), w.split(sizes), strict=True):
                assert hull_distance(list(pts), part) < 1e-5


def test_phase_equals_a_hand_written_loop(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    candidates: list[dict[str, torch.Tensor]] = []

    class Copy(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch < 4:
                named = pl_module.named_parameters()
                candidates.append({n: p.detach().clone() for n, p in named})

    module, _, _ = fit(tmp_path, twa, callbacks=[Copy()])
    model = Regressor()
    optimizer = SubspaceOptimizer(
        model.named_parameters(), build_subspace(candidates), total_steps=8
    )
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            mse(model.net(x), y).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(module))
    assert torch.equal(optimizer.averaging_weights, twa.averaging_weights)


def test_collecting_leaves_training_as_it_is(tmp_path) -> None:
    shuffling = DataLoader(regression_data(), batch_size=16, shuffle=True)
    L.seed_everything(3, verbose=False)
    twa = TWACallback(start_epoch=4, validate_average=True, collect=CollectConfig(start=0))
    _, with_twa, _ = fit(tmp_path, twa, Regressor(batchnorm=True), train=shuffling)
    L.seed_everything(3, verbose=False)
    plain = Recorder(twa)
    without = trainer(tmp_path, callbacks=[plain], max_epochs=4)
    without.fit(Regressor(batchnorm=True), shuffling, loader(32, seed=1))
    for epoch in range(4):
        assert torch.equal(with_twa.epochs[epoch], plain.epochs[epoch])


def test_the_phase_starts_with_averaged_buffers(tmp_path) -> None:
    class Buffers(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.zeros(2))
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("cache", torch.full((2,), -torch.inf), persistent=False)
            self.at_the_start: tuple[list[float], int] | None = None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if twa.phase == "optimize" and self.at_the_start is None:
                self.at_the_start = self.level.tolist(), int(self.count)
            self.level += 1.0
            self.count += 1
            return super().training_step(batch, batch_idx)

    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=1))
    module, _, _ = fit(tmp_path, twa, Buffers())
    # 4 steps an epoch: the ends of epochs 1, 2, 3 are after 8, 12 and 16 steps
    assert module.at_the_start == ([12.0, 12.0], 16), "mean of floats, newest of the others"
    assert bool((module.cache == -torch.inf).all())


# --- collecting


def test_candidates_by_optimizer_steps_within_a_window(tmp_path) -> None:
    twa = TWACallback(
        start_epoch=4, collect=CollectConfig(start=1, every_n_train_steps=3, max_candidates=3)
    )
    _, recorder, _ = fit(tmp_path, twa)
    # 4 steps an epoch: epochs 1..3 end at step 16; multiples of 3 from 6 on, the newest three
    assert twa.candidate_names == ["step=9", "step=12", "step=15"]
    names = dict(zip(twa.candidate_names, twa._run.store, strict=True))
    stored = torch.cat([t.double().reshape(-1) for t in names["step=9"].parameters.values()])
    assert torch.equal(stored, recorder.steps[8][1])


def test_every_n_epochs_counts_as_model_checkpoint_does(tmp_path) -> None:
    twa = TWACallback(start_epoch=5, collect=CollectConfig(start=0, every_n_epochs=2))
    fit(tmp_path, twa, max_epochs=6)
    assert twa.candidate_names == ["epoch=1", "epoch=3"]


def test_start_epoch_as_fraction(tmp_path) -> None:
    twa = TWACallback(start_epoch=0.5)
    fit(tmp_path, twa, max_epochs=8)
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


# --- data of the phase


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
    assert rows(module.seen["collect"]) == rows([b[0] for b in loader()])
    seen = module.seen["optimize"]
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


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # BatchNorm's
def test_backbone_that_is_unfrozen_while_collecting(tmp_path) -> None:
    class Two(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
            self.head = nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return mse(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trainable, 0.05)

    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)
    module, recorder, _ = fit(tmp_path, twa, Two(), val=None, callbacks=[finetuning])
    beta = twa.averaging_weights[:, 0]
    exact = sum(b * recorder.epochs[e] for e, b in enumerate(beta))
    torch.testing.assert_close(weights(module), exact, rtol=1e-5, atol=1e-6)


def test_max_steps_with_endless_epochs(tmp_path) -> None:
    twa = TWACallback(start_epoch=2)
    _, recorder, the_trainer = fit(tmp_path, twa, max_epochs=-1, max_steps=11)
    assert the_trainer.global_step == 11
    assert twa.phase == "done"
    assert sum(phase != "collect" for phase, _ in recorder.steps) == 3


def test_max_time_needs_a_constant_schedule_and_works_with_it(tmp_path) -> None:
    twa = TWACallback(start_epoch=2, solver=SolverConfig(lr=0.1, schedule="constant"))
    fit(tmp_path, twa, max_epochs=-1, callbacks=[Timer(duration={"seconds": 1})])
    assert twa.phase == "done"


@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_val_check_interval_longer_than_the_phase_s_data(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, data="val")
    _, _, the_trainer = fit(tmp_path, twa, val_check_interval=3)
    assert twa.phase == "done"
    assert the_trainer.val_check_interval == 3


@pytest.mark.parametrize("interval", [2, 0.5])
def test_validation_within_an_epoch_sees_the_weights_the_next_step_starts_from(
    tmp_path, interval
) -> None:
    class AtValidation(L.Callback):
        def __init__(self) -> None:
            self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.seen: torch.Tensor | None = None

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.seen, self.phase = weights(pl_module), twa.phase

        def on_train_batch_start(self, trainer, pl_module, *args):
            if self.seen is not None and twa.phase == "optimize" and self.phase == "optimize":
                self.pairs.append((self.seen, weights(pl_module)))
            self.seen = None

    at_validation = AtValidation()
    twa = TWACallback(start_epoch=4)
    fit(
        tmp_path,
        twa,
        val_check_interval=interval,
        callbacks=[at_validation],
        num_sanity_val_steps=0,
    )
    assert len(at_validation.pairs) == 3  # the last validation has no step after it
    assert all(torch.equal(seen, used) for seen, used in at_validation.pairs)


# --- optimization features


class GradientRecorder(L.Callback):
    """Largest entry and norm of the gradient that the optimizer steps with, by phase."""

    def __init__(self, twa: TWACallback) -> None:
        self.twa, self.norms, self.largest = twa, [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads and self.twa.phase == "optimize":
            flat = torch.cat([g.reshape(-1) for g in grads])
            self.norms.append(float(flat.norm()))
            self.largest.append(float(flat.abs().max()))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(tmp_path, algorithm) -> None:
    twa = TWACallback(start_epoch=4)
    record = GradientRecorder(twa)
    limit = 1e-3
    fit(
        tmp_path,
        twa,
        callbacks=[record],
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    measured = record.norms if algorithm == "norm" else record.largest
    assert measured
    assert max(measured) <= limit * 1.001
    free = GradientRecorder(again := TWACallback(start_epoch=4))
    fit(tmp_path, again, callbacks=[free])
    assert min(free.norms) > limit


def test_accumulated_gradients_equal_a_larger_batch(tmp_path) -> None:
    results = []
    for batch_size, accumulate in ((8, 2), (16, 1)):
        L.seed_everything(5, verbose=False)
        twa = TWACallback(start_epoch=4)
        module, _, the_trainer = fit(
            tmp_path,
            twa,
            train=loader(batch_size=batch_size),
            accumulate_grad_batches=accumulate,
        )
        assert the_trainer.global_step == 24
        results.append((weights(module), twa.averaging_weights))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


def test_candidate_steps_count_optimizer_steps_with_accumulation(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0, every_n_train_steps=3))
    fit(tmp_path, twa, train=loader(batch_size=8), accumulate_grad_batches=3)
    # 8 batches an epoch, 3 steps (the last batch of an epoch always steps)
    assert twa.candidate_names == ["step=3", "step=6", "step=9", "step=12"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_precisions(tmp_path, precision) -> None:
    twa = TWACallback(start_epoch=4)
    how: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        how = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    module, recorder, _ = fit(tmp_path, twa, **how)
    assert twa.phase == "done"
    beta = twa.averaging_weights
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    rtol = 1e-2 if precision == "bf16-true" else 1e-5
    torch.testing.assert_close(weights(module), expected, rtol=rtol, atol=rtol / 10)
    assert abs(beta[0, 0].item() - 0.5) > 1e-3


def test_16_mixed_overflow_skips_the_step_and_nothing_moves(tmp_path) -> None:
    class Overflow(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.current_epoch == 4 else loss

    twa = TWACallback(start_epoch=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _, recorder, _ = fit(tmp_path, twa, Overflow(), plugins=plugin)
    phase = [w for p, w in recorder.steps if p != "collect"]
    center = (recorder.epochs[2] + recorder.epochs[3]) / 2
    for w in phase[:4]:
        torch.testing.assert_close(w, center, rtol=1e-6, atol=1e-7)
    assert not torch.equal(phase[4], phase[3])


def test_gradient_that_is_not_finite_is_skipped_with_a_warning(tmp_path, caplog) -> None:
    class Broken(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.current_epoch == 4 else loss

    with pytest.warns(UserWarning, match="not finite"):
        module, _, _ = fit(tmp_path, TWACallback(start_epoch=4), Broken())
    assert "4 steps were skipped" in caplog.text
    assert bool(torch.isfinite(weights(module)).all())


class TwoGroups(Regressor):
    """Two parameter groups, one frozen parameter, and one with a gradient but no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.left_out = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.left_out.square().sum() * 1e-3

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[-1]
        return torch.optim.AdamW(
            [{"params": first.parameters(), "lr": 1e-2}, {"params": last.parameters(), "lr": 1e-3}]
        )


def test_parameter_groups_frozen_and_unoptimized_parameters(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    module, _, the_trainer = fit(tmp_path, twa, TwoGroups())
    assert torch.equal(module.frozen, torch.ones(3))
    assert torch.equal(module.left_out, torch.ones(3))
    assert len(the_trainer.optimizers[0].param_groups) == 2
    first, second = twa._run.store
    assert second.parameters["frozen"] is first.parameters["frozen"], "frozen tensors share memory"


def test_tied_parameters_stay_tied_and_count_once(tmp_path) -> None:
    class Tied(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 3, bias=False)
            self.decode = nn.Linear(3, 6, bias=False)
            self.decode.weight = nn.Parameter(self.encode.weight.detach().T.contiguous())
            self.again = nn.Linear(6, 3, bias=False)
            self.again.weight = self.encode.weight

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            code = self.encode(batch[0]) + self.again(batch[0])
            return F.mse_loss(self.decode(code), batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    twa = TWACallback(start_epoch=4)
    module, _, _ = fit(tmp_path, twa, Tied(), val=None)
    assert module.again.weight is module.encode.weight
    assert set(next(iter(twa._run.store)).parameters) == {"encode.weight", "decode.weight"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_modules(tmp_path) -> None:
    def compiled(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="eager")

    class Silent(Regressor):  # torch.compile cannot trace self.log
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

    results = []
    for compile_all in (False, True):
        L.seed_everything(5, verbose=False)
        twa = TWACallback(start_epoch=4)
        module = Silent()
        if compile_all:
            fit_module = compiled(module)
        else:
            module.net = compiled(module.net)
            fit_module = module
        trainer(tmp_path, callbacks=[twa]).fit(fit_module, loader())
        assert twa.phase == "done"
        results.append(weights(module))
    torch.testing.assert_close(*results)


def test_channels_last_and_conv(tmp_path) -> None:
    class Images(Dataset):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            g = torch.Generator().manual_seed(i)
            x = torch.randn(3, 6, 6, generator=g)
            return x, x.mean().reshape(1)

    class Conv(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)
            ).to(memory_format=torch.channels_last)

    twa = TWACallback(start_epoch=4)
    module, recorder, _ = fit(tmp_path, twa, Conv(), train=DataLoader(Images(), 8), val=None)
    assert module.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    beta = twa.averaging_weights
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4, 16])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_low_bit_basis_in_a_run(tmp_path, caplog, bits, blocks) -> None:
    subspace = SubspaceConfig(bits=bits, blocks=blocks)
    twa = TWACallback(start_epoch=4, subspace=subspace, collect=CollectConfig(start=0))
    module, recorder, _ = fit(tmp_path, twa, Regressor(batchnorm=True))
    assert twa.phase == "done"
    assert f"{'1 bit' if bits == 1 else f'{bits} bits'}, relative error " in caplog.text
    center = torch.stack([recorder.epochs[e] for e in range(4)]).mean(0)
    steps = [w for phase, w in recorder.steps if phase != "collect"]
    assert not torch.equal(steps[0], steps[-1])
    beta = twa.averaging_weights
    if blocks == "global":
        exact = sum(beta[e, 0] * recorder.epochs[e] for e in range(4))
        error = {1: 0.9, 4: 0.15, 16: 0.004}[bits]
        assert (weights(module) - exact).norm() < error * (exact - center).norm()


# --- the rest of the Trainer


def test_fast_dev_run_does_nothing(tmp_path) -> None:
    twa = TWACallback(start_epoch=100)
    trainer(tmp_path, callbacks=[twa], fast_dev_run=True).fit(Regressor(), loader())
    assert twa.phase == "collect"
    assert twa.num_candidates == 0


@pytest.mark.filterwarnings("ignore")  # the tuners' own
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_lr_finder_is_left_alone(tmp_path, caplog, how) -> None:
    class Tuned(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    twa = TWACallback(start_epoch=4)
    finder = [LearningRateFinder(num_training_steps=8)] if how == "callback" else []
    the_trainer = trainer(tmp_path, callbacks=[*finder, twa], enable_checkpointing=True)
    module = Tuned()
    if how == "tuner":
        Tuner(the_trainer).lr_find(module, loader(), num_training=8)
        assert "TWA" not in caplog.text
        assert twa.phase == "collect"
        assert twa.num_candidates == 0
    the_trainer.fit(module, loader())
    assert "collecting starts here" not in caplog.text
    assert twa.phase == "done"
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


@pytest.mark.filterwarnings("ignore")  # the tuner's own
def test_batch_size_finder_is_left_alone(tmp_path) -> None:
    class Sized(Regressor):
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return loader(batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return loader(batch_size=self.batch_size)

    twa = TWACallback(start_epoch=4)
    the_trainer = trainer(tmp_path, callbacks=[twa], enable_checkpointing=True)
    module = Sized()
    Tuner(the_trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert twa.num_candidates == 0
    the_trainer.fit(module)
    assert twa.candidate_names == ["epoch=2", "epoch=3"]


def test_two_fits_with_one_callback(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    fit(tmp_path, twa)
    first_beta = twa.averaging_weights
    L.seed_everything(8, verbose=False)
    second, recorder, _ = fit(tmp_path, twa, Regressor(lr=0.02))
    assert twa.phase == "done"
    assert twa.num_candidates == 2
    assert not torch.equal(first_beta, twa.averaging_weights)
    beta = twa.averaging_weights
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    torch.testing.assert_close(weights(second), expected, rtol=1e-6, atol=1e-7)


def test_validate_test_and_predict_outside_fit_are_left_alone(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    module, _, the_trainer = fit(tmp_path, twa)
    before = weights(module)
    beta = twa.averaging_weights
    the_trainer.validate(module, loader(), verbose=False)
    the_trainer.test(module, loader(), verbose=False)
    assert torch.equal(before, weights(module))
    assert torch.equal(beta, twa.averaging_weights)
    assert twa.phase == "done"


def test_early_stopping_in_the_phase_finishes_it(tmp_path) -> None:
    class StopInPhase(EarlyStopping):
        def _run_early_stopping_check(self, trainer):
            trainer.should_stop = trainer.current_epoch == 5

    twa = TWACallback(start_epoch=4)
    _, _, the_trainer = fit(
        tmp_path,
        twa,
        Regressor(batchnorm=True),
        max_epochs=20,
        callbacks=[StopInPhase("val_loss")],
    )
    assert the_trainer.current_epoch == 6
    assert twa.phase == "done"


# --- logging


def test_logged_values_and_learning_rate_monitor(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    _, _, the_trainer = fit(tmp_path, twa, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    import csv

    with open(f"{logger.log_dir}/metrics.csv") as file:
        table = list(csv.DictReader(file))
    lrs = [float(r["twa/lr"]) for r in table if r["twa/lr"]]
    norms = [float(r["twa/coefficient_norm"]) for r in table if r["twa/coefficient_norm"]]
    counts = [float(r["twa/num_candidates"]) for r in table if r["twa/num_candidates"]]
    monitored = [float(r["lr-SubspaceOptimizer"]) for r in table if r["lr-SubspaceOptimizer"]]
    assert len(lrs) == len(norms) == 8
    assert sum(lrs) == pytest.approx(2.0, rel=1e-6), "the radius is the sum of the learning rates"
    assert norms[-1] <= 2.0
    assert norms[-1] > 0
    assert counts == [0, 0, 1, 2, 2, 2]
    assert monitored == pytest.approx(lrs)
    assert the_trainer.callback_metrics["twa/num_candidates"] == 2


def test_schedulers_are_visible_but_do_not_step_in_the_phase(tmp_path) -> None:
    seen: list[tuple[int, float]] = []

    class Looks(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((self.trainer.current_epoch, self.lr_schedulers().get_last_lr()[0]))
            return super().training_step(batch, batch_idx)

    fit(tmp_path, TWACallback(start_epoch=4), Looks())
    by_epoch = dict(seen)
    assert by_epoch[2] == pytest.approx(0.05 * 0.7)
    assert by_epoch[4] == by_epoch[5] == pytest.approx(0.05 * 0.7**2)


def test_plateau_scheduler_without_its_metric_in_the_phase(tmp_path) -> None:
    class Plateau(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.log("watched", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "watched"},
            }

    twa = TWACallback(start_epoch=4)
    fit(tmp_path, twa, Plateau())
    assert twa.phase == "done"


def test_report_says_when_coefficients_press_against_the_budget(tmp_path, caplog) -> None:
    full_batch = loader(batch_size=64)
    for radius in (50.0, 0.05):
        caplog.clear()
        L.seed_everything(1, verbose=False)
        twa = TWACallback(start_epoch=4, solver=SolverConfig(radius=radius))
        fit(tmp_path, twa, train=full_batch, max_epochs=14)
        assert "phase finished after 10 optimizer steps in " in caplog.text
        assert (
            "they ended 0.05 from the uniform average, of SolverConfig.radius=0.05" in caplog.text
        ) is (radius == 0.05)
