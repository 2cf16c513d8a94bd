"""Optimizers that others change within a run: fine-tuning schedules, the learning rate finder,
schedule-free optimizers.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint
from packaging.version import Version
from torch import Tensor, nn

from helpers.common import Regressor, loader, trainer, weights
from helpers.plain import TWACallback
from helpers.short import holds_its_average, short_run
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Parameters were unfrozen in the phase",
    "ignore:Parameters that were trained are frozen now",
    "ignore:.*callbacks used to create the checkpoint need to be",
)


# --- fine-tuning


class Backbone(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] + 0.1 * self.backbone(batch[0]), batch[1]), 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


@pytest.mark.parametrize(
    "unfreeze", [4, *(pytest.param(e, marks=pytest.mark.long) for e in (1, 3, 5))]
)
@pytest.mark.parametrize("before", [False, True])
def test_backbone_finetuning_resumes_from_every_epoch(tmp_path, unfreeze, before) -> None:
    def fit(saver: Any = None, ckpt: Any = None) -> tuple[TWACallback, Backbone, L.Trainer]:
        tuning = BackboneFinetuning(unfreeze, lambda epoch: 1.0, verbose=False)
        others = [tuning, *([saver] if saver else [])]
        how = {"trainer": {"enable_checkpointing": bool(saver)}, "before": before}
        return short_run(tmp_path, Backbone, *others, ckpt_path=ckpt, **how)

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    twa, whole, the_trainer = fit(saver)
    holds_its_average(twa, whole)
    assert len(the_trainer.optimizers[0].param_groups) == 2
    for epoch in range(1, 6):
        _, resumed, again = fit(ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert len(again.optimizers[0].param_groups) == 2
        if epoch < unfreeze or epoch >= 4:  # later it stays frozen, with and without a phase
            assert torch.equal(weights(whole), weights(resumed)), epoch


@pytest.mark.matrix(4)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("epoch", [3, 5])
@pytest.mark.parametrize(
    "how", [{}, {"subspace": SubspaceConfig(group_size=2)}, {"subspace": SubspaceConfig(bits=4)}]
)
def test_the_learning_rate_finder_within_a_run(tmp_path, before, epoch, how) -> None:
    class Finder(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == epoch:
                self.lr_find(trainer, pl_module)

    _, plain, _ = short_run(tmp_path, Regressor, twa=how)
    finder = Finder(num_training_steps=12, update_attr=False)
    twa, finding, _ = short_run(tmp_path, Regressor, finder, before=before, twa=how)
    holds_its_average(twa, finding)
    if epoch == 5:
        assert torch.equal(weights(plain), weights(finding))


def test_a_checkpoint_of_before_the_phase_is_not_loaded_within_it(tmp_path) -> None:
    class Rewinds(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 5:
                trainer._checkpoint_connector.restore(tmp_path / "epoch=2.ckpt")

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.raises(RuntimeError, match="A checkpoint of before the TWA phase"):
        short_run(tmp_path, Regressor, Rewinds(), saver, trainer={"enable_checkpointing": True})


def test_weights_that_are_restored_within_the_phase_make_way_for_the_phases(tmp_path) -> None:
    class Restores(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch >= 4:
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        parameter.fill_(0.1)

    _, plain, _ = short_run(tmp_path, Regressor)
    _, restored, _ = short_run(tmp_path, Regressor, Restores())
    assert torch.equal(weights(plain), weights(restored))


# --- real ones


HOW = {
    "phase": {},
    "validated": {"validate_average": True},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "uniform, validated": {"solver": SolverConfig(name="uniform"), "validate_average": True},
    "cycles": {"start_epoch": 2, "cycles": 2},
}


@pytest.mark.matrix(6)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("by_module", [False, True])
def test_schedule_free(tmp_path, how, interval, by_module) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    class Free(Regressor):
        def its(self) -> Any:
            return self.optimizers() if by_module else self.trainer.optimizers[0]

        def configure_optimizers(self) -> Any:
            return schedulefree.AdamWScheduleFree(self.parameters(), 0.05)

        def on_train_batch_start(self, *args: Any) -> None:
            self.its().train()

        def on_validation_epoch_start(self) -> None:
            self.its().eval()

        def on_train_end(self) -> None:
            self.its().eval()

        def on_before_zero_grad(self, *args: Any) -> None:
            seen.append(weights(self))

    seen: list[Tensor] = []
    L.seed_everything(3, verbose=False)
    module = Free()
    trainer(tmp_path, val_check_interval=interval).fit(module, loader(), loader(32, seed=1))
    plain, ordinary = seen, 8 if how == "cycles" else 16
    seen = []
    twa, module, the_trainer = short_run(
        tmp_path, Free, twa=HOW[how], trainer={"val_check_interval": interval}
    )
    assert len(seen) == len(plain) == 24
    for now, then in zip(seen[:ordinary], plain[:ordinary], strict=True):
        assert torch.equal(now, then), "ordinary training is as it was"
    holds_its_average(twa, module)
    (optimizer,) = the_trainer.optimizers
    assert optimizer.param_groups[0]["train_mode"] is False
    before = weights(module)
    optimizer.train()
    assert not torch.equal(weights(module), before), "the fit is over: it may switch again"


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("transition", [2, 4, 5])
@pytest.mark.parametrize("before", [False, True])
def test_finetuning_scheduler(tmp_path, best, transition, before) -> None:
    fts = pytest.importorskip("finetuning_scheduler")

    class Deep(Regressor):
        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)]

    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(
        f"0: {{params: [net.2.weight, net.2.bias], max_transition_epoch: {transition}}}\n"
        f"1: {{params: [net.0.weight, net.0.bias], max_transition_epoch: -1}}\n"
    )

    def fit(folder: str, ckpt: Any = None) -> tuple[TWACallback, Deep, L.Trainer]:
        own = [
            fts.FinetuningScheduler(ft_schedule=str(schedule), restore_best=best),
            fts.FTSCheckpoint(tmp_path / folder, "{epoch}", monitor="val_loss", save_top_k=-1),
            fts.FTSEarlyStopping(monitor="val_loss", patience=100),
        ]
        how = {"enable_checkpointing": True}
        return short_run(tmp_path, Deep, *own, before=before, trainer=how, ckpt_path=ckpt)

    twa, whole, the_trainer = fit("whole")
    holds_its_average(twa, whole)
    assert [len(g["params"]) for g in the_trainer.optimizers[0].param_groups] == [2, 2]
    if Version(version("finetuning-scheduler")) < Version("2.9"):
        return  # which by itself adds a group twice where it resumes
    _, resumed, again = fit("again", tmp_path / "whole" / "epoch=4.ckpt")
    assert len(again.optimizers[0].param_groups) == 2
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)


# --- optimizers that step in ways of their own


class Sharp(torch.optim.SGD):
    """A user's sharpness-aware optimizer, with steps of its own names."""

    def first_step(self) -> None:
        super().step()

    def second_step(self) -> None:
        super().step()


@pytest.mark.parametrize("way", ["own names", "the class's"])
def test_steps_that_are_not_the_trainers_do_not_pass_for_an_average(tmp_path, way) -> None:
    class Own(Regressor):
        def configure_optimizers(self) -> Any:
            return Sharp(self.parameters(), 0.05)

        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            optimizer_closure()
            if way == "own names":
                optimizer.first_step()
                optimizer_closure()
                optimizer.second_step()
            else:
                torch.optim.SGD.step(self.trainer.optimizers[0])

    with pytest.warns(UserWarning, match="something else than a step of the Trainer's optimizer"):
        twa, module, _ = short_run(tmp_path, Own)
    holds_its_average(twa, module)
    is_mixed(twa, module)


def is_mixed(twa: TWACallback, module: nn.Module) -> None:
    """The weights are the sum of averaging weights times candidates."""
    members, weight = list(twa._run.store), twa.averaging_weights[:, 0].tolist()
    for name, parameter in module.named_parameters():
        parts = zip(weight, members, strict=True)
        mean = sum(beta * member.parameters[name].double() for beta, member in parts)
        torch.testing.assert_close(parameter.detach().double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:In the TWA phase something else")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("by_module", [False, True])
def test_an_optimizer_that_is_put_in_place_at_the_start_of_a_batch(
    tmp_path, last, by_module
) -> None:
    at = (5, 3) if last else (4, 1)

    def exchange(the_trainer: L.Trainer, module: Any, batch_idx: int) -> None:
        if (the_trainer.current_epoch, batch_idx) == at:
            the_trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 0.5)]

    class Exchanges(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            exchange(trainer, pl_module, batch_idx)

    class Module(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if by_module:
                exchange(self.trainer, self, batch_idx)

    twa, module, _ = short_run(tmp_path, Module, *([] if by_module else [Exchanges()]))
    holds_its_average(twa, module)
    is_mixed(twa, module)
    assert abs(float(twa.averaging_weights[0, 0]) - 0.25) > 1e-3


@pytest.mark.parametrize("uniform", [False, True])
def test_a_schedule_free_optimizer_told_to_evaluate_after_the_fit(tmp_path, uniform) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    class Free(Regressor):
        def configure_optimizers(self) -> Any:
            return schedulefree.AdamWScheduleFree(self.parameters(), 0.05)

        def on_train_batch_start(self, *args: Any) -> None:
            self.optimizers().train()

        def on_test_epoch_start(self) -> None:
            for optimizer in self.trainer.optimizers:
                optimizer.eval()

    options = {"solver": SolverConfig(name="uniform")} if uniform else {}
    twa, module, the_trainer = short_run(
        tmp_path, Free, twa=options, trainer={"limit_val_batches": 0}
    )
    (optimizer,) = the_trainer.optimizers
    assert not {"train", "eval", "step"} & vars(optimizer).keys(), "nothing is left behind"
    the_trainer.test(module, loader(32, seed=1), verbose=False)
    optimizer.eval()
    holds_its_average(twa, module)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("rate", [None, "missing", 0.0])
def test_groups_without_a_rate(tmp_path, amp, rate) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    class Relative(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.sub_(0.05 * parameter.grad)
            return loss

    class Module(Regressor):
        def configure_optimizers(self) -> Any:
            optimizer = Relative(self.parameters(), 0.1)
            for group in optimizer.param_groups:
                if rate == "missing":
                    del group["lr"]
                else:
                    group["lr"] = rate
            return optimizer

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    how = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)} if amp else {}
    solver = SolverConfig(schedule="constant", lr=0.2)
    twa, module, _ = short_run(tmp_path, Module, twa={"solver": solver}, trainer=how)
    holds_its_average(twa, module)
    assert float((twa.averaging_weights - 0.25).abs().max()) > 1e-3


def test_an_error_while_a_run_finishes_gives_the_modes_back(tmp_path, monkeypatch) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    class Free(Regressor):
        def configure_optimizers(self) -> Any:
            return schedulefree.AdamWScheduleFree(self.parameters(), 0.05)

        def on_train_batch_start(self, *args: Any) -> None:
            self.optimizers().train()

    def broken(*args: Any) -> None:
        raise KeyError("planned")

    monkeypatch.setattr("lightning_twa.phases.finished.FinishedAverage.take", broken)
    L.seed_everything(3, verbose=False)
    twa = TWACallback(4)
    the_trainer = trainer(tmp_path, callbacks=[twa])
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(Free(), loader())
    (optimizer,) = the_trainer.optimizers
    assert not {"train", "eval", "step"} & vars(optimizer).keys()
