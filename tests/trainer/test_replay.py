"""Training steps that are run again for statistics alone: as in training, and without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.modules import Augmented
from helpers.plain import CollectConfig, TWACallback


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


@pytest.mark.parametrize("limit", [1.0, 3])
def test_every_batch_is_run_once_and_counted(tmp_path, capsys, caplog, limit) -> None:
    class Seen(Regressor):
        def __init__(self) -> None:
            super().__init__(batchnorm=True)
            self.seen: list[tuple[int, int, bool]] = []
            self.log = lambda *args, **kwargs: self.seen.append((-1, -1, True))  # the user's own

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.append((self.trainer.current_epoch, batch_idx, torch.is_grad_enabled()))
            return super().training_step(batch, batch_idx)

    module, batches = Seen(), 4 if limit == 1.0 else 3
    own = module.log
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer(
            tmp_path,
            callbacks=[TWACallback(2, collect=CollectConfig(start=0))],
            max_epochs=3,
            limit_train_batches=limit,
            limit_val_batches=0,
        ).fit(module, loader())
    again = [(epoch, i) for epoch, i, grad in module.seen if not grad]
    assert again == 2 * [(2, i) for i in range(batches)], "at the switch, and at the end"
    logged = [s for s in module.seen if s[0] == -1]
    assert len(logged) == 5 * batches + 3, "a loss, two values of the phase, numbers of candidates"
    assert module.log is own
    assert f"re-estimated over {batches} training batches" in caplog.text + capsys.readouterr().err


def test_the_bar_moves_with_every_batch(tmp_path, monkeypatch) -> None:
    shown: list[tuple[str, int | None, list[int]]] = []

    @contextmanager
    def show(trainer: Any, what: str, unit: str, total: int | None) -> Iterator[Any]:
        shown.append((what, total, []))
        yield shown[-1][2].append

    monkeypatch.setattr("lightning_twa.trainer.replay.show_progress", show)
    trainer(tmp_path, callbacks=[TWACallback(4, collect=CollectConfig(start=2))]).fit(
        Regressor(batchnorm=True), loader()
    )
    assert shown == 2 * [("re-estimating BatchNorm statistics", 4, [1, 1, 1, 1])]
