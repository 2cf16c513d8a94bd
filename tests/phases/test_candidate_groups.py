"""Candidates that are taken in groups."""

from __future__ import annotations

import shutil
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import (
    Recorder,
    Regressor,
    flat,
    loader,
    mse,
    regression_data,
    trainer,
    uniform,
    weights,
)
from helpers.ddp import fit, strided
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, run
from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.commands.inspect import describe
from lightning_twa.phases import span
from lightning_twa.phases.candidate_groups import CandidateGroups

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def test_groups_cover_every_candidate_and_step() -> None:
    for n, size, total in [(7, 3, 20), (60, 8, 101), (3, 2, 5), (5, 4, 2), (9, 2, 3)]:
        groups = CandidateGroups(n, 2, size, total)
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


@pytest.mark.matrix(4)
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
    mix = sum(b * flat(c.parameters) for b, c in zip(beta, twa.candidates, strict=True))
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
    lines = describe(tmp_path / "epoch=5.ckpt")
    assert "optimizer steps of the phase: 4" in lines


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


@pytest.mark.matrix(1)
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.parametrize(
    ("what", "distribute"),
    [
        ("groups", "shard"),
        ("cycles", "replicate"),
        pytest.param("groups", "replicate", marks=pytest.mark.long),
        pytest.param("cycles", "shard", marks=pytest.mark.long),
    ],
)
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


# The last steps hold all that epochs do, four bits what 32 do: this member stays in `make test`.
@pytest.mark.parametrize("bits", [4, pytest.param(32, marks=pytest.mark.long)])
@pytest.mark.parametrize("written", [pytest.param("epoch", marks=pytest.mark.long), "step"])
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
    files = sorted(Path(tmp_path, "c").glob("*=*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
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
    (file,) = tmp_path.glob("*=*.ckpt")
    with pytest.raises(ValueError, match=r"^The checkpoint's phase was started with .*group_size"):
        run(tmp_path / "b", Regressor, lambda: make_twa(None), ckpt_path=file, max_epochs=8)


@pytest.mark.parametrize("bits", [32, 4])
def test_only_one_group_is_in_memory(tmp_path, monkeypatch, bits) -> None:
    """The directions of the one before have been freed when the next ones are made."""
    build, held = span.build_subspace, []

    def checked(*args: Any, **kwargs: Any) -> Any:
        assert all(kept() is None for kept in held)
        subspace = build(*args, **kwargs)
        stored = subspace.stored
        tensors = stored.state_dict().values()
        held.extend(weakref.ref(kept) for kept in (stored, subspace.center, *tensors))
        return subspace

    monkeypatch.setattr(span, "build_subspace", checked)
    twa = TWACallback(
        6, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=2, bits=bits)
    )
    the_trainer = trainer(tmp_path, max_epochs=8, callbacks=[twa])
    the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.phase == "done"
    assert len(held) > 3 * 2


def test_released_directions_say_so() -> None:
    subspace = build_subspace([{"w": torch.randn(5)} for _ in range(3)], SubspaceConfig(bits=4))
    x = torch.randn(subspace.num_directions, 1)
    weights_before, error = subspace.averaging_weights(x), subspace.stored.error
    subspace.release()
    assert subspace.nbytes == 0
    assert subspace.stored.error == error
    assert torch.equal(subspace.averaging_weights(x), weights_before)
    assert "released" not in repr(subspace)
    with pytest.raises(AttributeError, match="released, so there is no 'expand'"):
        subspace.expand(x, [torch.empty(5)])


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


def test_skipped_steps_of_every_group_are_reported(tmp_path, caplog, capsys) -> None:
    class Overflows(Regressor):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step in (17, 22):
                self.net[0].weight.grad.fill_(torch.inf)

    twa = TWACallback(4, collect=CollectConfig(start=0), subspace=SubspaceConfig(group_size=2))
    with (
        caplog.at_level("INFO", logger="lightning.pytorch"),
        pytest.warns(UserWarning, match="is not finite"),
    ):
        trainer(tmp_path, callbacks=[twa]).fit(Overflows(), loader())
    text = caplog.text + capsys.readouterr().err
    assert "finished after 6 optimizer steps" in text
    assert "2 steps were skipped because the gradient was not finite" in text
