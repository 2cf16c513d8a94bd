"""Options of a Trainer mean in the phase what they mean in training."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, Dataset

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import TWACallback
from helpers.runs import fit


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
