"""Phases that are repeated, that early stopping begins, and that take candidates in groups."""

from __future__ import annotations

import itertools
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Recorder, Regressor, loader, mse, regression_data, trainer, weights
from helpers.ddp import fit, flat, strided
from helpers.resume import differences, ordered, run
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    SubspaceOptimizer,
    TWACallback,
    build_subspace,
)
from lightning_twa.groups import Groups
from lightning_twa.inspecting import describe_run
from lightning_twa.schedule import resolve_plans

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def uniform(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: sum(s[n].double() for s in states) / len(states) for n in states[0]}


def plain_run(collect_and_optimize: list[tuple[list[int], list[int]]], name: str) -> list[Tensor]:
    """The weights after every epoch, by a loop without Lightning: epochs that collect and epochs
    that optimize, in turn.
    """
    torch.manual_seed(3)
    module = Regressor()
    (user,), (scheduler,) = module.configure_optimizers()
    ends: dict[int, Tensor] = {}
    for collecting, optimizing in collect_and_optimize:
        states = []
        for epoch in collecting:
            for batch in loader():
                user.zero_grad()
                mse(module.net(batch[0]), batch[1]).backward()
                user.step()
            scheduler.step()
            states.append({n: p.detach().clone() for n, p in module.named_parameters()})
            ends[epoch] = weights(module)
        if name == "uniform":
            module.load_state_dict(uniform(states[-2:]))
            ends[collecting[-1]] = weights(module)
            continue
        subspace = build_subspace(states[-2:])
        optimizer = SubspaceOptimizer(
            module.named_parameters(), subspace, total_steps=4 * len(optimizing)
        )
        for epoch in optimizing:
            for batch in loader():
                optimizer.zero_grad()
                mse(module.net(batch[0]), batch[1]).backward()
                optimizer.step()
            ends[epoch] = weights(module)
    return [ends[epoch] for epoch in sorted(ends)]


@pytest.mark.parametrize("name", ["full_matrix_adam", "uniform"])
def test_cycles_are_what_a_loop_by_hand_gives(tmp_path, name) -> None:
    twa = TWACallback(
        start_epoch=3, collect=CollectConfig(start=1), solver=SolverConfig(name=name), cycles=2
    )
    if name == "uniform":
        twa = TWACallback(collect=CollectConfig(start=2), solver=SolverConfig(name=name), cycles=2)
    torch.manual_seed(3)
    module, recorder = Regressor(), Recorder(twa)
    the_trainer = trainer(tmp_path, callbacks=[twa, recorder], max_epochs=8)
    the_trainer.fit(module, loader())
    if name == "uniform":
        expected = plain_run([([0, 1, 2, 3], []), ([4, 5, 6, 7], [])], name)
        phases = (["collect"] * 15 + ["done"]) * 2
        names = ["epoch=6", "epoch=7"]
    else:
        expected = plain_run([([0, 1, 2], [3]), ([4, 5, 6], [7])], name)
        phases = (["collect"] * 12 + ["optimize"] * 3 + ["done"]) * 2
        names = ["epoch=5", "epoch=6"]
    assert [phase for phase, _ in recorder.steps] == phases
    assert twa.candidate_names == names
    for epoch, value in enumerate(expected):
        torch.testing.assert_close(recorder.epochs[epoch], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights(module), recorder.epochs[7])
    torch.testing.assert_close(twa.averaging_weights.sum(dim=0), torch.ones(1).double())
    assert [type(o).__name__ for o in the_trainer.optimizers] == ["SGD"]


@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.parametrize("written", ["epoch", "step"])
def test_cycles_resume_exactly(tmp_path, data, written) -> None:
    def make_twa() -> TWACallback:
        return TWACallback(2, data, cycles=3, collect=CollectConfig(start=0))

    saver = ModelCheckpoint(
        tmp_path / "c",
        filename="{step}",
        save_top_k=-1,
        **({"every_n_epochs": 1} if written == "epoch" else {"every_n_train_steps": 3}),
    )
    options: dict[str, Any] = {"max_epochs": 9, "num_sanity_val_steps": 0}
    module = lambda: Regressor(batchnorm=True)  # noqa: E731
    whole = run(tmp_path / "a", module, make_twa, saver=saver, **options)
    files = sorted(Path(tmp_path, "c").glob("*.ckpt"))
    assert len(files) >= 8
    for file in files:
        resumed = run(tmp_path / "b", module, make_twa, ckpt_path=file, **options)
        assert differences(whole, resumed) == [], file.name


def test_checkpoints_of_a_new_cycle_do_not_hold_the_average_of_the_last(tmp_path) -> None:
    twa = TWACallback(3, collect=CollectConfig(start=1), cycles=2, validate_average=True)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    recorder = Recorder(twa)
    trainer(
        tmp_path, callbacks=[twa, recorder, saver], max_epochs=8, enable_checkpointing=True
    ).fit(Regressor(), loader(), loader(32, seed=1))
    for epoch in (0, 4):  # no candidate yet: the weights are those of training
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        saved = torch.cat([t.double().flatten() for t in checkpoint["state_dict"].values()])
        assert torch.equal(saved, recorder.epochs[epoch])
        assert "current_model_state" not in checkpoint
        state = checkpoint["callbacks"].get("TWACallback", {})
        assert "averaging_weights" not in state
        assert not state.get("candidate_names")
    later = torch.load(tmp_path / "epoch=6.ckpt", weights_only=True)
    assert "current_model_state" in later
    assert later["callbacks"]["TWACallback"]["candidate_names"] == ["epoch=5", "epoch=6"]


@pytest.mark.parametrize("name", ["full_matrix_adam", "uniform"])
def test_the_window_of_a_later_cycle_is_that_of_the_first(tmp_path, name) -> None:
    def make_twa() -> TWACallback:
        collect = CollectConfig(start=0, max_candidates=2)
        return TWACallback(3, collect=collect, cycles=2, solver=SolverConfig(name=name))

    saver = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    whole = run(tmp_path / "a", Regressor, make_twa, saver=saver, max_epochs=10)
    last = ["epoch=6", "epoch=7"] if name != "uniform" else ["epoch=8", "epoch=9"]
    assert whole.callback["candidate_names"] == last
    for epoch in (2, 3, 4, 6):  # collecting, within the phase, after it, in the next cycle
        file = tmp_path / "c" / f"epoch={epoch}.ckpt"
        resumed = run(tmp_path / "b", Regressor, make_twa, ckpt_path=file, max_epochs=10)
        assert differences(whole, resumed) == [], epoch


def test_a_stop_in_a_later_cycle_says_where_the_weights_are(tmp_path) -> None:
    twa = TWACallback(2, cycles=2, collect=CollectConfig(start=0))
    message = (
        "Training stopped in part 2 of cycles=2, before its phase began: ordinary training has "
        "moved the weights on from the average of part 1."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        trainer(tmp_path, callbacks=[twa], max_epochs=8, max_steps=18).fit(Regressor(), loader())
    assert twa.phase == "collect"


def test_a_finished_run_of_cycles_cannot_go_on(tmp_path) -> None:
    twa = TWACallback(2, cycles=2, collect=CollectConfig(start=0))
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=6)
    the_trainer.fit(Regressor(), loader())
    the_trainer.fit_loop.max_epochs = 8
    with pytest.raises(RuntimeError, match="was finished, but the Trainer goes on with epoch 6"):
        the_trainer.fit(Regressor(), loader())


@pytest.mark.parametrize(
    ("arguments", "epochs", "message"),
    [
        ({"cycles": 0}, 6, "Invalid cycles=0. Must be an int >= 1."),
        ({"cycles": True}, 6, "Invalid cycles=True. Must be an int >= 1."),
        (
            {"cycles": 2, "collect": CollectConfig(checkpoints="*.pt")},
            6,
            "cycles=2 does not go with CollectConfig.checkpoints: candidates from files belong to "
            "one phase. Use cycles=1.",
        ),
        (
            {"cycles": 2, "start_on_early_stopping": True},
            6,
            "cycles=2 does not go with start_on_early_stopping=True, which makes the phase the end "
            "of the run. Use one of them.",
        ),
        (
            {"cycles": 3, "start_epoch": 4},
            12,
            "cycles=3 gives cycles of 4 epochs, within which start_epoch and CollectConfig.start "
            "count. start_epoch=4 must be below max_epochs=4: the phase trains the averaging "
            "coefficients in the epochs from start_epoch on. Lower start_epoch or raise "
            "max_epochs.",
        ),
        (
            {"cycles": 2, "start_epoch": 2},
            -1,
            "cycles=2 divides the run's epochs, but this Trainer has no limit in epochs "
            "(max_epochs=-1, or max_steps alone). Set Trainer(max_epochs=...).",
        ),
        (
            {"start_on_early_stopping": 1},
            6,
            "Invalid start_on_early_stopping=1. Must be True or False.",
        ),
        (
            {"start_on_early_stopping": True},
            6,
            "TWACallback(start_on_early_stopping=True) needs an EarlyStopping callback, but the "
            "Trainer has none. Add one, or leave the argument out.",
        ),
        (
            {"start_on_early_stopping": True, "solver": SolverConfig(name="uniform")},
            6,
            "start_on_early_stopping=True has no meaning with SolverConfig(name='uniform'), which "
            "trains no coefficients. Leave it out.",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, arguments, epochs, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(tmp_path, callbacks=[TWACallback(**arguments)], max_epochs=epochs).fit(
            Regressor(), loader()
        )


@pytest.mark.parametrize(("epochs", "cycles"), [(12, 3), (16, 3), (9, 2), (23, 4)])
def test_plans_of_cycles_are_one_plan_moved(epochs, cycles) -> None:
    plans = resolve_plans(0.5, CollectConfig(), epochs, cycles=cycles)
    bounds = [0, *[plan.end for plan in plans]]
    assert bounds[-1] == epochs
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= epochs // cycles + 1
    for first, plan in zip(bounds, plans, strict=False):
        (alone,) = resolve_plans(0.5, CollectConfig(), plan.end - first)
        assert plan.start_epoch == first + alone.start_epoch
        assert plan.collect_start == first + alone.collect_start


# --- early stopping


class StopAt(EarlyStopping):
    """Wants to stop after an epoch, whatever the metric, once."""

    def __init__(self, epoch: int, at_epoch_end: bool) -> None:
        super().__init__("val_loss", check_on_train_epoch_end=at_epoch_end)
        self.epoch = epoch

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        return self.now == self.epoch, None

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        self.now = trainer.current_epoch
        super()._run_early_stopping_check(trainer)


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("data", ["train", "val"])
def test_the_phase_begins_where_early_stopping_would_end_the_run(
    tmp_path, data, at_epoch_end
) -> None:
    collect = CollectConfig(start=0)
    torch.manual_seed(0)
    expected = Regressor(batchnorm=True)
    module = Regressor(batchnorm=True)
    module.load_state_dict(expected.state_dict())
    planned = TWACallback(3, data, collect=collect)
    trainer(tmp_path, callbacks=[planned], max_epochs=5).fit(expected, loader(), loader(32, seed=1))

    twa = TWACallback(6, data, collect=collect, start_on_early_stopping=True)
    recorder, stop = Recorder(twa), StopAt(2, at_epoch_end)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, recorder], max_epochs=8)
    torch.manual_seed(0)
    Regressor(batchnorm=True)  # draws what the first run drew
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert sorted(recorder.epochs) == [0, 1, 2, 3, 4]
    assert the_trainer.current_epoch == 5
    assert the_trainer.max_epochs == 8  # given back
    assert twa.candidate_names == ["epoch=0", "epoch=1", "epoch=2"]
    if data == "train":  # the validation data of the phase are in random order
        assert torch.equal(weights(module), weights(expected))
    assert twa.phase == "done"
    assert "_run_early_stopping_check" not in vars(stop)


@pytest.mark.parametrize("epoch", [1, 4])
def test_an_exception_gives_everything_back(tmp_path, epoch) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == epoch:
                raise RuntimeError("CRASH")

    twa = TWACallback(6, collect=CollectConfig(start=0), start_on_early_stopping=True)
    stop = StopAt(2, at_epoch_end=True)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, Fails()], max_epochs=8)
    with pytest.raises(RuntimeError, match="CRASH"):
        the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.phase == ("collect" if epoch == 1 else "optimize")
    assert the_trainer.max_epochs == 8
    assert "_run_early_stopping_check" not in vars(stop)
    assert [type(o).__name__ for o in the_trainer.optimizers] == ["SGD"]


@pytest.mark.parametrize("what", ["second group", "second cycle"])
def test_an_exception_in_a_later_part_gives_everything_back(tmp_path, monkeypatch, what) -> None:
    import lightning_twa.optimization as optimization

    calls, build = [], optimization.build_subspace

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return build(*args, **kwargs)

    monkeypatch.setattr(optimization, "build_subspace", fails)
    collect = CollectConfig(start=0)
    twa = TWACallback(2, "val", cycles=2, collect=collect)
    if what == "second group":
        twa = TWACallback(4, "val", collect=collect, subspace=SubspaceConfig(group_size=2))
    module, train, val = Regressor(), loader(), loader(32, seed=1)
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=8)
    with pytest.raises(MemoryError, match="no room"):
        the_trainer.fit(module, train, val)
    assert [type(o).__name__ for o in the_trainer.optimizers] == ["SGD"]
    assert the_trainer.fit_loop._data_source.instance is train
    if what == "second group":  # its state is still one that goes on
        state = twa.state_dict()
        assert state["groups"]["results"] == []
        beta = twa.averaging_weights[:, 0]
        mix = sum(b * weights_of(c.parameters) for b, c in zip(beta, twa.candidates, strict=True))
        torch.testing.assert_close(weights(module), mix, rtol=1e-5, atol=1e-6)


def test_patience_counts_anew_in_the_phase(tmp_path) -> None:
    stop = EarlyStopping("val_loss", patience=2, mode="max", check_on_train_epoch_end=True)
    twa = TWACallback(
        12, collect=CollectConfig(start=0), start_on_early_stopping=True, subspace=SubspaceConfig()
    )
    recorder = Recorder(twa)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, recorder], max_epochs=16)
    the_trainer.fit(Regressor(lr=0.001), loader(), loader(32, seed=1))
    phases = [phase for phase, _ in recorder.steps]
    # the loss falls: two epochs without a larger one end collecting; two more the phase
    assert phases.count("collect") == 3 * 4
    assert len(phases) >= 5 * 4
    assert twa.phase == "done"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_patience_counts_anew_in_a_phase_that_is_resumed(tmp_path) -> None:
    def fit(ckpt: Path | None) -> tuple[Tensor, int]:
        stop = EarlyStopping("val_loss", patience=2, mode="max", check_on_train_epoch_end=True)
        twa = TWACallback(12, collect=CollectConfig(start=0), start_on_early_stopping=True)
        saver = ModelCheckpoint(
            tmp_path / ("whole" if ckpt is None else "resumed"),
            filename="{epoch}",
            save_top_k=-1,
            save_on_train_epoch_end=True,
        )
        torch.manual_seed(0 if ckpt is None else 9)
        module = Regressor(lr=0.001)
        the_trainer = trainer(
            tmp_path, callbacks=[stop, twa, saver], max_epochs=16, enable_checkpointing=True
        )
        the_trainer.fit(module, ordered(), loader(32, seed=1), ckpt_path=ckpt)
        return weights(module), the_trainer.current_epoch

    expected, epochs = fit(None)
    assert epochs > 4
    files = {int(file.stem[6:]): file for file in (tmp_path / "whole").glob("*.ckpt")}
    assert sorted(files) == list(range(epochs))
    for epoch in range(epochs - 1):  # the last is that of a finished run
        file = files[epoch]
        found, ended = fit(file)
        assert ended == epochs, file.name
        assert torch.equal(found, expected), file.name


def test_other_stops_and_too_few_candidates_stop_as_ever(tmp_path) -> None:
    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    few = ", or CollectConfig.start: there were 0 candidates, and start_on_early_stopping needs two"
    cases = [([Stops(), StopAt(9, True)], 0, ""), ([StopAt(2, True)], 4, few)]
    for callbacks, start, ending in cases:
        twa = TWACallback(6, collect=CollectConfig(start=start), start_on_early_stopping=True)
        the_trainer = trainer(tmp_path, callbacks=[*callbacks, twa], max_epochs=8)
        message = f"^TWA never ran: .* Lower start_epoch to run it{ending}\\.$"
        with pytest.warns(UserWarning, match=message):
            the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
        assert the_trainer.current_epoch == 3
        assert twa.phase == "collect"


@pytest.mark.parametrize("written", ["epoch", "step"])
def test_a_phase_that_early_stopping_began_resumes(tmp_path, written) -> None:
    class Stop(StopAt):
        def __init__(self) -> None:
            super().__init__(2, at_epoch_end=True)

    def make_twa() -> TWACallback:
        return TWACallback(6, collect=CollectConfig(start=0), start_on_early_stopping=True)

    every = {"every_n_epochs": 1} if written == "epoch" else {"every_n_train_steps": 3}
    results = {}
    for file in [None, *range(9)]:
        folder = tmp_path / "checkpoints"
        if file is None:
            saver = ModelCheckpoint(
                folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True, **every
            )
        files = sorted(folder.glob("*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
        if file is not None and file >= len(files):
            continue
        torch.manual_seed(0 if file is None else 9)
        module, twa, stop = Regressor(batchnorm=True), make_twa(), Stop()
        callbacks = [stop, twa, *([saver] if file is None else [])]
        the_trainer = trainer(
            tmp_path, callbacks=callbacks, max_epochs=8, enable_checkpointing=file is None
        )
        path = None if file is None else files[file]
        the_trainer.fit(module, ordered(), loader(32, seed=1), ckpt_path=path)
        results[None if path is None else path.name] = (weights(module), the_trainer.current_epoch)
    assert len(results) > 4
    # Resumed from a checkpoint between an epoch's last batch and its end, no EarlyStopping is asked
    # about that epoch, with this callback or without.
    if written == "step":
        assert results.pop("step=12.ckpt")[1] == 8
    for name, (value, epoch) in results.items():
        assert epoch == 5, name
        assert torch.equal(value, results[None][0]), name


# --- groups of candidates


def test_groups_cover_every_candidate_and_step() -> None:
    for n, size, total in [(7, 3, 20), (60, 8, 101), (3, 2, 5), (5, 4, 2), (9, 2, 3)]:
        groups = Groups(n, 2, size, total)
        members, steps = [], []
        while True:
            members.append(groups.members)
            steps.append(groups.steps)
            if groups.last:
                break
            groups = groups.following(torch.zeros(len(groups.members), 2, dtype=torch.float64))
        assert set().union(*members) == set(range(n))
        assert all(2 <= len(m) <= size for m in members)
        assert sum(steps) == max(total, groups.count)
        assert max(steps) - min(steps) <= 1
        moved = torch.zeros(len(groups.members), 2, dtype=torch.float64)
        torch.testing.assert_close(groups.result(moved), torch.full((n, 2), 1 / n).double())


def by_hand(states: list[dict[str, Tensor]], config: SubspaceConfig, total: int) -> Any:
    """Groups in float64 as the paper's code treats them: averaging weights and weights."""
    module = Regressor().double()
    states = [{k: v.double() for k, v in s.items()} for s in states]
    count = -(-len(states) // config.group_size)
    start, betas, results = uniform(states), [], []
    beta = torch.full((len(states), 1), 1 / len(states), dtype=torch.float64)
    batches = [(x.double(), y.double()) for x, y in loader()]
    done = 0
    for g in range(count):
        members = list(range(g, len(states), count))
        if len(members) == 1:
            members = [*members, 0]
        subspace = build_subspace([states[i] for i in members], config, start=start)
        steps = total * (g + 1) // count - total * g // count
        optimizer = SubspaceOptimizer(module.named_parameters(), subspace, total_steps=steps)
        for _ in range(steps):
            x, y = batches[done % len(batches)]
            done += 1
            optimizer.zero_grad()
            mse(module.net(x), y).backward()
            optimizer.step()
        beta = beta.clone()
        beta[members] += optimizer.averaging_weights
        start = {k: v.detach().clone() for k, v in module.named_parameters()}
        betas.append(beta)
        results.append(start)
    return torch.stack(betas).mean(dim=0), uniform(results)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("basis", ["pca", "candidates", "orthonormal"])
def test_groups_are_what_a_loop_by_hand_gives(tmp_path, basis, size) -> None:
    config = SubspaceConfig(basis=basis, group_size=size)
    solver = SolverConfig() if basis == "pca" else SolverConfig(lr=0.01)
    twa = TWACallback(7, collect=CollectConfig(start=0), subspace=config, solver=solver)
    torch.manual_seed(0)
    module = Regressor()
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=10)
    the_trainer.fit(module, loader())
    states = [dict(c.parameters) for c in twa.candidates]
    if basis == "pca":
        beta, expected = by_hand(states, config, 12)
        torch.testing.assert_close(twa.averaging_weights, beta, rtol=1e-3, atol=1e-4)
        flat = torch.cat([v.reshape(-1) for v in expected.values()])
        torch.testing.assert_close(weights(module), flat, rtol=1e-4, atol=1e-5)
    # the averaging weights are those of the weights in the model, whatever the basis
    beta = twa.averaging_weights[:, 0]
    mix = {n: sum(b * s[n].double() for b, s in zip(beta, states, strict=True)) for n in states[0]}
    flat = torch.cat([v.reshape(-1) for v in mix.values()])
    torch.testing.assert_close(weights(module), flat, rtol=1e-5, atol=1e-6)


def test_more_groups_than_steps(tmp_path) -> None:
    twa = TWACallback(9, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=2))
    recorder = Recorder(twa)
    module = Regressor()
    message = "group_size=2 makes 5 groups, .* 3 optimizer steps: the last 2 are left out"
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, callbacks=[twa, recorder], max_epochs=10, limit_train_batches=3).fit(
            module, loader()
        )
    assert [phase for phase, _ in recorder.steps][-3:] == ["optimize", "optimize", "done"]
    beta = twa.averaging_weights[:, 0]
    mix = sum(b * weights_of(c.parameters) for b, c in zip(beta, twa.candidates, strict=True))
    torch.testing.assert_close(weights(module), mix, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The gradient at optimizer step .* is not finite")
def test_the_report_counts_the_steps_of_all_groups(tmp_path, caplog) -> None:
    class Broken(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.current_epoch == 4 else loss

    def fit(ckpt_path: Any = None) -> str:
        caplog.clear()
        twa = TWACallback(4, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=2))
        saver = [] if ckpt_path else [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        trainer(
            tmp_path, callbacks=[twa, *saver], enable_checkpointing=bool(saver), max_epochs=7
        ).fit(Broken(), loader(), ckpt_path=ckpt_path)
        return caplog.text

    texts = [fit(), fit(tmp_path / "epoch=4.ckpt"), fit(tmp_path / "epoch=5.ckpt")]
    for text in texts:
        assert "phase finished after 8 optimizer steps in " in text
        assert "TWA: 4 steps were skipped because the gradient was not finite." in text
    lines = describe_run(tmp_path / "epoch=5.ckpt")
    assert "optimizer steps of the phase: 4" in lines


def weights_of(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.double().flatten() for p in parameters.values()])


def test_groups_lower_the_loss_on_what_they_train(tmp_path) -> None:
    losses = {}
    for size in (None, 4):
        twa = TWACallback(
            10, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=size)
        )
        torch.manual_seed(0)
        module = Regressor()
        trainer(tmp_path, callbacks=[twa], max_epochs=16).fit(module, loader())
        x, y = regression_data().tensors
        losses[size] = mse(module.net(x), y).item()
        average = uniform([dict(c.parameters) for c in twa.candidates])
        module.load_state_dict(average)
        losses["start"] = mse(module.net(x), y).item()
    assert losses[None] < losses["start"]
    assert losses[4] < losses["start"]


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
@pytest.mark.parametrize("what", ["groups", "cycles"])
def test_two_processes_do_what_one_does(tmp_path, what, distribute) -> None:
    def make_twa(**kwargs: Any) -> TWACallback:
        if what == "cycles":
            return TWACallback(2, collect=CollectConfig(start=0), cycles=2, **kwargs)
        subspace = SubspaceConfig(group_size=2, blocks="tensor")
        return TWACallback(5, collect=CollectConfig(start=0), subspace=subspace, **kwargs)

    options: dict[str, Any] = {"max_epochs": 8, "use_distributed_sampler": False}
    module = Regressor()
    (one,) = fit(tmp_path / "one", make_twa(), deepcopy(module), 1, train=strided(1), **options)
    first, second = fit(
        tmp_path / "two",
        make_twa(distribute=distribute),
        module,
        train=strided(2),
        **options,
    )
    assert torch.equal(flat(first["state"]), flat(second["state"]))
    torch.testing.assert_close(flat(first["state"]), flat(one["state"]), rtol=1e-4, atol=1e-5)
    beta = one["averaging_weights"]
    torch.testing.assert_close(first["averaging_weights"], beta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("written", ["epoch", "step"])
def test_groups_resume_exactly(tmp_path, bits, written) -> None:
    def make_twa() -> TWACallback:
        return TWACallback(
            5,
            collect=CollectConfig(start=0),
            subspace=SubspaceConfig(group_size=2, bits=bits, blocks="tensor"),
        )

    every = {"every_n_epochs": 1} if written == "epoch" else {"every_n_train_steps": 1}
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1, **every)
    whole = run(tmp_path / "a", Regressor, make_twa, saver=saver, max_epochs=8)
    files = sorted(Path(tmp_path, "c").glob("*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
    for file in files[-13:]:
        resumed = run(tmp_path / "b", Regressor, make_twa, ckpt_path=file, max_epochs=8)
        assert differences(whole, resumed) == [], file.name
        shutil.rmtree(tmp_path / "b", ignore_errors=True)


def test_other_groups_are_refused_on_resuming(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=30, save_top_k=-1)

    def make_twa(size: int | None) -> TWACallback:
        return TWACallback(
            5, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=size)
        )

    run(tmp_path / "a", Regressor, lambda: make_twa(2), saver=saver, max_epochs=8)
    (file,) = tmp_path.glob("*.ckpt")
    with pytest.raises(ValueError, match=r"^The checkpoint's phase was started with .*group_size"):
        run(tmp_path / "b", Regressor, lambda: make_twa(None), ckpt_path=file, max_epochs=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SubspaceConfig(group_size=1),
            "Invalid SubspaceConfig.group_size=1. Must be an int >= 2, or None (all at once).",
        ),
        (
            lambda: SubspaceConfig(group_size=3, parametrization="simplex"),
            "SubspaceConfig.parametrization='simplex' does not go with group_size=3: a group "
            "starts from weights that are no average of its own candidates. Use "
            "parametrization='free', or no group_size.",
        ),
    ],
)
def test_bad_groups(make, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_groups_need_a_length(tmp_path) -> None:
    twa = TWACallback(
        3,
        subspace=SubspaceConfig(group_size=2),
        solver=SolverConfig(lr=0.1, schedule="constant"),
    )
    with pytest.raises(ValueError, match=r"SubspaceConfig\.group_size=2 shares it out among the"):
        trainer(tmp_path, callbacks=[twa], max_epochs=-1).fit(Regressor(), loader())


def test_a_subspace_with_a_start_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {"w": torch.randn(5, 3, generator=generator, dtype=torch.float64)}  # noqa: E731
    states, start = [draw() for _ in range(4)], draw()
    subspace = build_subspace(states, start=start)
    x = torch.randn(subspace.num_directions, 1, generator=generator, dtype=torch.float64)
    out = torch.empty(5, 3, dtype=torch.float64)
    subspace.expand(x, [out])
    moved = subspace.averaging_weights(x)
    expected = start["w"] + sum(m * s["w"] for m, s in zip(moved[:, 0], states, strict=True))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(moved.sum(), torch.zeros(()).double(), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"^parametrization='simplex' starts from the uniform"):
        build_subspace(states, SubspaceConfig(parametrization="simplex"), start=start)
    with pytest.raises(ValueError, match=r"^The start"):
        build_subspace(states, start={"w": torch.zeros(2)})
