"""Modules that step their own optimizers: uniform averages."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.common import Regressor, flat, loader, mse, weights
from helpers.plain import CollectConfig
from helpers.resume import equal
from helpers.short import holds_its_average, short_run
from lightning_twa import SolverConfig, average

UNIFORM = {"solver": SolverConfig(name="uniform"), "start_epoch": 3, "collect": CollectConfig()}


class Game(Regressor):
    """Two networks with BatchNorm, trained in turn, with their own schedulers."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.automatic_optimization = False
        self.judge = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net.parameters(), 0.01)
        second = torch.optim.SGD(self.judge.parameters(), 0.05, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(o, 3) for o in (first, second)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        made = self.net(x)
        self.step_one(first, mse(made, y) - 0.1 * self.score(x, made).mean())

        def closure() -> Tensor:
            loss = self.score(x, self.net(x).detach()).mean() - self.score(x, y).mean()
            second.zero_grad()
            self.manual_backward(loss + self.score(x, y).square().mean())
            return loss

        second.step(closure)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def step_one(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        return self.judge(torch.cat([x, y], dim=1))


def states(the_trainer: Any) -> Any:
    found = [o.state_dict() for o in the_trainer.optimizers]
    return deepcopy([*found, *(c.scheduler.state_dict() for c in the_trainer.lr_scheduler_configs)])


def noting(kind: type[Regressor]) -> tuple[type[Regressor], list[dict[str, Tensor]], list[Any]]:
    epochs: list[dict[str, Tensor]] = []
    optimizers: list[Any] = []

    class Notes(kind):  # type: ignore[misc, valid-type]
        def on_train_epoch_end(self) -> None:
            epochs.append({n: p.detach().clone() for n, p in self.named_parameters()})
            optimizers.append(states(self.trainer))

    return Notes, epochs, optimizers


def test_several_optimizers_and_batchnorm(tmp_path) -> None:
    kind, plain, kept = noting(Game)
    short_run(tmp_path, kind, twa={"start_epoch": 5, "solver": SolverConfig(name="uniform")})
    kind, epochs, optimizers = noting(Game)
    twa, module, the_trainer = short_run(tmp_path, kind, twa=UNIFORM)
    holds_its_average(twa, module)
    assert twa.candidate_names == ["epoch=3", "epoch=4", "epoch=5"]
    for a, b in zip(plain[:5], epochs[:5], strict=True):
        assert equal(a, b), "training is as ever"
    assert equal(kept, optimizers), "no pass for statistics has stepped anything"
    assert equal(states(the_trainer), optimizers[-1])
    assert the_trainer.global_step == 6 * 4 * 2
    norm = module.judge[1]
    assert norm.num_batches_tracked > 0
    with torch.no_grad():
        inputs = [self_input(module, batch) for batch in loader()]
    expected = torch.stack([made.mean(0) for made in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)


def self_input(module: Game, batch: Any) -> Tensor:
    """What the judge's BatchNorm sees of a batch, over its passes in one step."""
    twin = deepcopy(module).train()
    seen: list[Tensor] = []
    twin.judge[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = twin.net(batch[0])
    for one in (made, made, batch[1], batch[1]):
        twin.score(batch[0], one)
    return torch.cat(seen)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_candidates_by_steps_of_several_optimizers(tmp_path, every) -> None:
    """Two steps a batch: one of a step in between is taken behind the batch."""
    seen: list[Tensor] = []

    class Notes(Game):
        def training_step(self, *args: Any) -> None:
            super().training_step(*args)
            if torch.is_grad_enabled():  # else for statistics
                seen.append(weights(self))

    collect = CollectConfig(start=0, every_n_train_steps=every)
    twa, _, _ = short_run(tmp_path, Notes, twa={**UNIFORM, "collect": collect})
    steps = [int(name.split("=")[1]) for name in twa.candidate_names]
    expected = [2 * i for i in range(1, 25) if 2 * i // every > (2 * i - 2) // every]
    assert steps == expected
    mean = average(twa)
    own = torch.cat([mean[n].reshape(-1) for n, _ in Game().named_parameters()])
    rows = torch.stack([seen[step // 2 - 1] for step in steps]).double().mean(0)
    torch.testing.assert_close(own.double(), rows, rtol=1e-5, atol=1e-7)


def test_running_averages_and_validation_of_the_average(tmp_path) -> None:
    collect = CollectConfig(ema_decays=(0.9,))
    options = {**UNIFORM, "collect": collect, "validate_average": True}
    kind, epochs, _ = noting(Game)
    twa, module, _ = short_run(tmp_path, kind, twa=options)
    holds_its_average(twa, module)
    assert twa.candidate_names[-1] == "ema(0.9)" or "ema(0.9)" in twa.candidate_names
    kind, plain, _ = noting(Game)
    short_run(tmp_path, kind, twa=UNIFORM)
    assert equal(plain[:5], epochs[:5])


def test_a_step_that_needs_gradients_keeps_its_statistics_with_a_warning(tmp_path) -> None:
    class Direct(Game):
        def step_one(self, optimizer: Any, loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="could not be re-estimated"):
        twa, module, _ = short_run(tmp_path, Direct, twa=UNIFORM)
    holds_its_average(twa, module)
    assert bool(torch.isfinite(flat(module.state_dict())).all())


@pytest.mark.filterwarnings("ignore:BatchNorm statistics could not be re-estimated")
@pytest.mark.parametrize("options", [{}, {"validate_average": True}, {"cycles": 2}])
def test_a_step_that_fails_between_toggles_leaves_nothing_frozen(tmp_path, options) -> None:
    """As one with a gradient penalty does where no gradients are computed."""

    class Penalty(Game):
        def step_one(self, optimizer: Any, loss: Tensor) -> None:
            self.toggle_optimizer(optimizer)
            torch.autograd.grad(loss, list(self.net.parameters()), retain_graph=True)
            super().step_one(optimizer, loss)
            self.untoggle_optimizer(optimizer)

    how = {**UNIFORM, "start_epoch": 1, **options}
    twa, module, _ = short_run(tmp_path, Penalty, twa=how)
    holds_its_average(twa, module)
    assert all(parameter.requires_grad for parameter in module.parameters())
