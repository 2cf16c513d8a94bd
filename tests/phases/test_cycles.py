"""Phases that are repeated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import Recorder, Regressor, loader, mse, trainer, uniform, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, run
from helpers.runs import is_borrowed
from lightning_twa import SolverConfig, SubspaceOptimizer, build_subspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


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
    assert not is_borrowed(the_trainer)


# With validation data more is to be resumed, and within an epoch too: this stays in `make test`.
@pytest.mark.parametrize("data", [pytest.param("train", marks=pytest.mark.long), "val"])
@pytest.mark.parametrize("written", [pytest.param("epoch", marks=pytest.mark.long), "step"])
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
    files = sorted(Path(tmp_path, "c").glob("*=*.ckpt"))
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
