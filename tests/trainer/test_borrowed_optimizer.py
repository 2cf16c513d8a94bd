"""The user's optimizer in the phase: what code does with it in ordinary training works there, has
no effect on the phase, and is not lost.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from helpers.common import Regressor, mse, weights
from helpers.runs import is_borrowed
from helpers.short import holds_its_average, short_run, twa_of
from lightning_twa import SolverConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Parameters were unfrozen in the phase",
    "ignore:Parameters that were trained are frozen now",
    "ignore:.*callbacks used to create the checkpoint need to be",
)


class Groups(Regressor):
    """Two groups with names, and a scheduler, which gives them ``initial_lr``."""

    kind: Any = torch.optim.AdamW

    def configure_optimizers(self) -> Any:
        first = {"params": self.net[0].parameters(), "name": "body", "lr": 1e-3}
        last = {"params": self.net[-1].parameters(), "name": "head", "lr": 1e-2}
        optimizer = self.kind([first, last])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


# --- reading


def read_index(optimizer: Any) -> Any:
    return optimizer.param_groups[1]["lr"]


def read_names(optimizer: Any) -> Any:
    return {group["name"]: group["weight_decay"] for group in optimizer.param_groups}


def read_betas(optimizer: Any) -> Any:
    return optimizer.param_groups[0]["betas"]


def read_initial_rates(optimizer: Any) -> Any:
    return [group["initial_lr"] for group in optimizer.param_groups]


def read_state(optimizer: Any) -> Any:
    parameter = optimizer.param_groups[1]["params"][0]
    return optimizer.state[parameter]["exp_avg"].shape, len(optimizer.state_dict()["state"])


def read_class(optimizer: Any) -> Any:
    return isinstance(optimizer, torch.optim.AdamW), optimizer.defaults["amsgrad"]


READINGS = [read_index, read_names, read_betas, read_initial_rates, read_state, read_class]
HOOKS = ["on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step",
         "on_before_zero_grad", "on_validation_start", "on_train_epoch_end"]  # fmt: skip


@pytest.mark.matrix(4)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("by_module", [False, True])
def test_what_is_read_of_the_optimizer_is_the_users(tmp_path, reading, by_module) -> None:
    class Reads(Groups):
        def read(self) -> None:
            if self.trainer.sanity_checking or not self.trainer.optimizers[0].state:
                return
            one = self.optimizers() if by_module else self.trainer.optimizers[0]
            found.setdefault(twa_of(self.trainer).phase, []).append(reading(one))

    for hook in HOOKS:
        setattr(Reads, hook, lambda self, *args, **kwargs: self.read())
    found: dict[str, list[Any]] = {}
    short_run(tmp_path, Reads)
    assert len(found["optimize"]) > 12
    if reading is not read_index:  # the scheduler has gone on between the two
        assert found["optimize"][0] == found["collect"][-1]
    assert all(one == found["optimize"][0] for one in found["optimize"])


def test_the_monitor_goes_on_with_the_users_groups(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    short_run(tmp_path, Groups, LearningRateMonitor("epoch"), trainer={"logger": logger})
    import csv

    with open(f"{logger.log_dir}/metrics.csv") as file:
        table = list(csv.DictReader(file))
    head = [float(r["lr-AdamW/head"]) for r in table if r.get("lr-AdamW/head")]
    assert head == pytest.approx([1e-2 * 0.5 ** min(epoch, 4) for epoch in range(6)])


# --- writing


def write_rates(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 7.0


def write_by_initial(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * 100


def write_key(optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 5.0
    optimizer.param_groups[1]["mine"] = "kept"


def write_state(optimizer: Any) -> None:
    state = optimizer.state_dict()
    for one in state["state"].values():
        one["exp_avg"] = torch.ones_like(one["exp_avg"])
    optimizer.load_state_dict(state)


def add_group(optimizer: Any) -> None:
    if len(optimizer.param_groups) == 2:
        group = {"params": nn.Parameter(torch.zeros(2)), "name": "new", "lr": 3.0}
        optimizer.add_param_group({**group, "initial_lr": 3.0})


WRITINGS = [write_rates, write_by_initial, write_key, write_state, add_group]


class Writes(L.Callback):
    """Writes into the user's optimizer at the start of the phase's epochs."""

    def __init__(self, writing: Any, hook: str = "on_train_epoch_start") -> None:
        self.writing = writing
        setattr(self, hook, self.write)
        self.setup = self.write  # type: ignore[method-assign]

    def write(self, the_trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if the_trainer.optimizers and twa_of(the_trainer).phase == "optimize":
            self.writing(the_trainer.optimizers[0])


@pytest.mark.matrix(6)
@pytest.mark.parametrize("writing", WRITINGS)
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_written_has_no_effect_on_the_phase_and_is_not_lost(
    tmp_path, writing, hook, before
) -> None:
    _, plain, _ = short_run(tmp_path, Groups)
    _, written, the_trainer = short_run(tmp_path, Groups, Writes(writing, hook), before=before)
    assert torch.equal(weights(plain), weights(written))
    (optimizer,) = the_trainer.optimizers
    groups = optimizer.param_groups
    if writing is write_rates:
        assert [g["lr"] for g in groups] == [7.0, 7.0]
    elif writing is write_by_initial:
        assert [g["lr"] for g in groups] == pytest.approx([0.1, 1.0])
    elif writing is write_key:
        assert groups[0]["weight_decay"] == 5.0
        assert groups[1]["mine"] == "kept"
    elif writing is write_state:
        assert all(bool((s["exp_avg"] == 1).all()) for s in optimizer.state.values())
    else:
        assert [g["name"] for g in groups] == ["body", "head", "new"]


@pytest.mark.filterwarnings("ignore:Lightning couldn't infer")
@pytest.mark.parametrize("solver", [None, SolverConfig(schedule="constant", lr=0.1)])
def test_a_module_that_sets_the_rate_at_each_step(tmp_path, solver) -> None:
    class Warms(Groups):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (0.0 if epoch >= 4 else 0.99)
            optimizer.step(closure=optimizer_closure)

    twa, _, the_trainer = short_run(tmp_path, Warms, twa={"solver": solver})
    assert twa.phase == "done"
    assert (twa.averaging_weights - 0.25).abs().max() > 1e-3, "the rate is the phase's own"
    assert [g["lr"] for g in the_trainer.optimizers[0].param_groups] == [0.0, 0.0]


def test_another_optimizer_in_its_place(tmp_path) -> None:
    """As fine-tuning schedules make one anew."""

    class Exchange(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 5:
                new = torch.optim.SGD(pl_module.parameters(), 0.5)
                trainer.strategy.optimizers = [new]
                scheduler = torch.optim.lr_scheduler.StepLR(new, 1, gamma=0.1)
                trainer.strategy.lr_scheduler_configs[0].scheduler = scheduler

    _, plain, _ = short_run(tmp_path, Groups)
    for before in (False, True):
        twa, other, the_trainer = short_run(tmp_path, Groups, Exchange(), before=before)
        assert torch.equal(weights(plain), weights(other))
        holds_its_average(twa, other)
        assert type(the_trainer.optimizers[0]) is torch.optim.SGD
        assert the_trainer.optimizers[0].param_groups[0]["lr"] == 0.5
        assert not is_borrowed(the_trainer)


def test_ordinary_training_goes_on_with_what_was_changed_in_the_phase(tmp_path) -> None:
    """In the next cycle: a scheduler made in the phase wraps the step that was borrowed."""
    rates: list[float] = []

    class Anew(Groups):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 2:
                (optimizer,) = self.trainer.optimizers
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 0.25
                (config,) = self.trainer.lr_scheduler_configs
                config.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    twa, module, the_trainer = short_run(tmp_path, Anew, twa={"start_epoch": 2, "cycles": 2})
    holds_its_average(twa, module)
    assert rates[8:12] == [0.25] * 4
    assert rates[12:16] == [0.25] * 4, "the epoch after the phase"
    assert rates[16:20] == pytest.approx([0.025] * 4)
    (state, *_) = the_trainer.optimizers[0].state.values()
    assert state["step"] == 16, "four epochs of ordinary training"


def test_a_fused_optimizer_with_a_loss_scaler(tmp_path) -> None:
    """It divides by the loss's scale itself, which the phase cannot."""
    from lightning.pytorch.plugins import MixedPrecision

    class Fused(Groups):
        @staticmethod
        def kind(groups: Any) -> Any:
            return torch.optim.AdamW(groups, fused=True)

    found = {}
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        twa, _, the_trainer = short_run(
            tmp_path, Fused, trainer={"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
        )
        found[scale] = twa.averaging_weights
        assert the_trainer.optimizers[0]._step_supports_amp_scaling is True
    assert torch.allclose(found[1.0], found[1024.0], atol=2e-2)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_the_users_optimizer_does_not_have_is_cleared_too(tmp_path, scaled) -> None:
    """A parameter that the module moves by hand, and that has gradients."""
    from lightning.pytorch.plugins import MixedPrecision

    seen: list[float] = []

    class ByHand(Groups):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return mse(self.net(batch[0]) + self.shift, batch[1])

        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.current_epoch < 4:
                with torch.no_grad():
                    self.shift.sub_(0.01 * self.shift.grad / scale())
                self.shift.grad = None
            else:
                seen.append(float(self.shift.grad.abs()))

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plugin = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)} if scaled else {}

    def scale() -> float:
        return float(scaler.get_scale()) if scaled else 1.0

    twa, module, _ = short_run(tmp_path, ByHand, trainer=plugin)
    holds_its_average(twa, module)
    assert max(seen) < 3, "gradients neither pile up nor stay scaled"
