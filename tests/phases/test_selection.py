"""Held-out data choose where the phase starts, and what of its path is kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.common import Recorder, Regressor, loader, mse, trainer, weights
from helpers.resume import differences, run
from helpers.selection import fitted, make, mixed
from lightning_twa import SolverConfig, SubspaceConfig, TWACallback
from lightning_twa.phases import span
from lightning_twa.phases.choose import Comparison, fixed_averages, points_of_path
from lightning_twa.results import Result

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to"),
    pytest.mark.filterwarnings("ignore:.*trains the averaging coefficients on the validation"),
]

# --- the fixed averages and what follows from their losses


def test_every_average_that_one_could_take_is_there_and_sums_to_one() -> None:
    given = ["power(0.05)", "ema(0.9)", "mean"]
    names = [*given, *(f"epoch={e}" for e in range(10)), "step=123"]
    found = fixed_averages(names, given, soup=False)
    assert list(found) == [
        *("last weights", "uniform", "last 2", "last 4", "last 8", "1-sqrt curve"),
        *given,
    ]
    for weights_of_it in found.values():
        assert float(weights_of_it.sum()) == pytest.approx(1)
    assert found["last weights"].nonzero().tolist() == [[13]]
    assert found["uniform"].nonzero().flatten().tolist() == list(range(3, 13))
    assert found["last 4"].nonzero().flatten().tolist() == [9, 10, 11, 12]
    assert found["power(0.05)"].nonzero().tolist() == [[0]]


def test_of_snapshots_by_steps_the_newest_is_the_last_weights() -> None:
    names = ["mean", "step=10", "step=20", "step=30"]
    found = fixed_averages(names, ["mean"], soup=False)
    assert found["last weights"].tolist() == [0, 0, 0, 1]
    assert found["uniform"].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_a_soup_has_the_uniform_average_and_each_alone() -> None:
    found = fixed_averages(["a", "b"], ["a", "b"], soup=True)
    assert {name: w.tolist() for name, w in found.items()} == {
        "uniform": [0.5, 0.5],
        "a": [1, 0],
        "b": [0, 1],
    }


@pytest.mark.parametrize(
    ("steps", "points"),
    [(None, []), (1, [1]), (5, [1, 2, 3, 4, 5]), (32, [4, 8, 12, 16, 20, 24, 28, 32])],
)
def test_about_eight_points_of_the_path(steps: int | None, points: list[int]) -> None:
    assert points_of_path(steps) == points


def compared(fixed: dict[str, list[float]], path: dict[int, list[float]]) -> Comparison:
    comparison = Comparison()
    comparison.fixed = {k: torch.tensor(v, dtype=torch.float64) for k, v in fixed.items()}
    comparison.path = {k: torch.tensor(v, dtype=torch.float64) for k, v in path.items()}
    return comparison


@pytest.mark.parametrize(
    ("others", "start"),
    [
        ({"last 2": [0.8, 1.8, 2.8]}, "last 2"),  # always better
        ({"last 2": [0.5, 2.2, 2.9]}, "power(0.13)"),  # on the average, by chance
        ({"last 2": [0.7, 2.2, 3.3]}, "power(0.13)"),  # worse
        ({"last 2": [float("nan")] * 3}, "power(0.13)"),
        ({"last 2": [0.9, 1.9, 2.9], "last 4": [0.5, 1.5, 2.5]}, "last 4"),
    ],
)
def test_the_start_is_the_best_where_it_is_clearly_better(others: Any, start: str) -> None:
    fixed = {"uniform": [5.0, 5.0, 5.0], "power(0.13)": [1.0, 2.0, 3.0], **others}
    comparison = compared(fixed, {})
    assert (comparison.start, comparison.accepted) == (start, None)


def test_without_that_average_the_uniform_one_is_the_usual() -> None:
    assert compared({"uniform": [1.0, 2.0], "last 2": [0.5, 2.4]}, {}).start == "uniform"
    assert compared({"a": [1.0, 2.0], "b": [0.5, 2.4]}, {}).start == "b"
    assert compared({"uniform": [1.0], "last 2": [0.99]}, {}).start == "last 2"  # one batch
    assert compared({"uniform": [float("nan")], "last 2": [1.0]}, {}).start == "last 2"


def test_one_batch_does_not_tell_averages_apart() -> None:
    """But points of the path from the start."""
    fixed = {"uniform": [0.2], "last 2": [0.1], "power(0.13)": [1.0]}
    comparison = compared(fixed, {2: [0.99], 4: [0.98]})
    assert comparison.chosen == (
        "power(0.13)",
        "another was better, but one batch does not tell",
    )
    assert comparison.accepted == 4
    assert compared({"last 2": [1.1], "power(0.13)": [1.0]}, {}).chosen[1] == "the best"
    assert compared({"last 2": [2.0], "power(0.13)": [float("nan")]}, {}).start == "last 2"
    two = {name: losses * 2 for name, losses in fixed.items()}
    assert compared(two, {}).chosen == ("last 2", "the best")
    assert compared({"last 2": [0.5, 2.2], "power(0.13)": [1.0, 2.0]}, {}).chosen == (
        "power(0.13)",
        "none was better by more than the standard error",
    )


@pytest.mark.parametrize(
    ("path", "accepted", "gain"),
    [
        ({4: [0.9, 1.9, 2.9], 8: [0.5, 1.5, 2.5]}, 8, 0.5),
        ({4: [0.5, 1.5, 2.5], 8: [0.9, 1.9, 2.9]}, 4, 0.5),
        ({4: [0.5, 2.2, 3.1]}, None, None),  # on the average, by chance
        ({4: [1.5, 2.5, 3.5]}, None, None),
        ({}, None, None),
    ],
)
def test_a_point_is_accepted_where_it_is_clearly_better(
    path: dict[int, list[float]], accepted: Any, gain: Any
) -> None:
    comparison = compared({"power(0.13)": [1.0, 2.0, 3.0]}, path)
    assert comparison.accepted == accepted
    if accepted is not None:
        assert comparison.gain_of(accepted) == pytest.approx((gain, 0.0))


def test_the_standard_error_is_of_paired_differences() -> None:
    comparison = compared({"a": [1.1, 0.9, 1.0]}, {3: [0.4, 0.6, 0.5]})
    gain, error = comparison.gain_of(3)
    assert gain == pytest.approx(0.5)
    assert error == pytest.approx(0.2 / 3**0.5)


# --- in a run


def test_the_phase_starts_from_the_best_fixed_average(tmp_path: Path) -> None:
    twa = make()
    starts: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if twa.phase == "optimize" and not starts:
                starts.append(weights(module))

    module = Regressor()
    trainer(tmp_path, callbacks=[twa, Look()]).fit(module, loader(), loader(32, seed=1))
    averages = fixed_averages(
        twa.candidate_names, ["power(0.05)", "power(0.13)", "mean"], soup=False
    )
    assert twa.result.losses.keys() == averages.keys()
    expected = mixed(twa, averages[twa.result.start][:, None])
    torch.testing.assert_close(starts[0].double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(twa.averaging_path[0, :, 0], averages[twa.result.start].float())
    assert twa.result.averages == {name: beta.tolist() for name, beta in averages.items()}
    assert Result.from_state(twa.result.state_dict()) == twa.result


def reference_loss(module: nn.Module, held_out: DataLoader) -> float:
    module.eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.train()
    with torch.no_grad():
        losses = [float(mse(module.net(x), y)) for x, y in held_out]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_its_losses_are_those_of_training_step_in_evaluation_mode(
    tmp_path: Path, batchnorm: bool
) -> None:
    twa, module = make(), Regressor(batchnorm)
    held_out = loader(16, 16, seed=1)  # one batch, whatever its order
    fitted(tmp_path, twa, module, held_out=held_out)
    averages = fixed_averages(
        twa.candidate_names, ["power(0.05)", "power(0.13)", "mean"], soup=False
    )
    for name, beta in averages.items():
        other, flat, at = copy.deepcopy(module), mixed(twa, beta[:, None]), 0
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(flat[at : at + p.numel()].view_as(p))
                at += p.numel()
        assert reference_loss(other, held_out) == pytest.approx(twa.result.losses[name], rel=1e-5)


@pytest.mark.matrix(6)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subspace": SubspaceConfig(blocks="tensor")},
        {"subspace": SubspaceConfig(bits=4)},
        {"subspace": SubspaceConfig(bits=16)},
        {"subspace": SubspaceConfig(parametrization="simplex")},
        {"subspace": SubspaceConfig(parametrization="mask")},
        {"subspace": SubspaceConfig(group_size=3)},
        {"subspace": SubspaceConfig(basis="orthonormal"), "solver": SolverConfig(lr=0.05)},
        {"subspace": SubspaceConfig(basis="candidates"), "solver": SolverConfig(lr=0.05)},
        {"solver": SolverConfig(sam_rho=0.1)},
        {"data": "val"},
        {"phase_steps": 6, "start_epoch": None},
        {"cycles": 2, "start_epoch": 2},
    ],
    ids=str,
)
def test_the_result_is_what_was_measured_to_be_better(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    twa = make(**options)
    module = fitted(tmp_path, twa)
    result = twa.result
    accepted = result.losses[result.start]
    if result.accepted is not None:
        accepted = result.path[result.accepted]
        assert accepted == min(result.path.values())
    assert accepted <= result.losses[result.start]
    assert result.gain == pytest.approx(result.losses[result.start] - accepted, abs=1e-6)
    flat = mixed(twa)
    if options.get("subspace", SubspaceConfig()).blocks == "global":
        close = 1e-5 if options.get("subspace", SubspaceConfig()).bits == 32 else 0.05
        torch.testing.assert_close(weights(module).double(), flat, rtol=close, atol=close)
    else:
        torch.testing.assert_close(twa.averaging_weights.sum(dim=0), torch.ones(4).double())


class Backwards(Regressor):
    """Its training loss rises in the phase where the held-out loss falls."""

    pull = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return -loss if self.training and self.pull else loss


class Pull(L.Callback):
    def __init__(self, twa: TWACallback) -> None:
        self.twa = twa

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        module.pull = self.twa.phase == "optimize"


@pytest.mark.matrix(3)
@pytest.mark.parametrize("parametrization", ["free", "simplex", "mask"])
@pytest.mark.parametrize("group_size", [None, 3])
def test_a_path_that_held_out_data_do_not_like_ends_at_its_start(
    tmp_path: Path, parametrization: str, group_size: int | None
) -> None:
    if group_size is not None and parametrization != "free":
        pytest.skip("groups are of free coefficients")
    subspace = SubspaceConfig(parametrization=parametrization, group_size=group_size)
    twa, module = make(subspace=subspace, solver=SolverConfig(radius=20.0)), Backwards()
    callbacks = [twa, Pull(twa)]
    trainer(tmp_path, callbacks=callbacks).fit(module, loader(), loader(32, seed=1))
    assert twa.result.accepted is None
    assert "learning gained nothing here" in str(twa.result)
    assert "chance" not in str(replace(twa.result, batches=2))
    assert "one batch: that may be chance" in str(replace(twa.result, batches=1))
    averages = fixed_averages(
        twa.candidate_names, ["power(0.05)", "power(0.13)", "mean"], soup=False
    )
    expected = averages[twa.result.start]
    torch.testing.assert_close(twa.averaging_weights[:, 0], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights(module).double(), mixed(twa), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("parametrization", ["simplex", "mask"])
def test_a_start_that_cannot_be_written_is_not_said_to_be_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parametrization: str
) -> None:
    def gone(*args: Any) -> None:
        raise OSError("the candidates' file is gone")

    monkeypatch.setattr(span, "put_weighted", gone)
    subspace = SubspaceConfig(parametrization=parametrization)
    twa, module = make(subspace=subspace, solver=SolverConfig(radius=20.0)), Backwards()
    with pytest.warns(UserWarning, match=r"could not be put together .*file is gone"):
        trainer(tmp_path, callbacks=[twa, Pull(twa)]).fit(module, loader(), loader(32, seed=1))
    result = twa.result
    assert result.accepted == result.steps
    assert result.gain < 0
    assert "above the average that was chosen" in str(result)
    assert "could not be put together from the candidates" in result.verdict
    assert [row.learned for row in result.rows() if row.result] == [True]
    tolerance = 1e-6 if parametrization == "simplex" else 1.0  # of a mask's last sample
    torch.testing.assert_close(weights(module).double(), mixed(twa), rtol=tolerance, atol=1e-6)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"subspace": SubspaceConfig(group_size=3)}, {"data": "val"}, {"start_epoch": None}],
    ids=["plain", "groups", "val", "by steps"],
)
def test_a_resumed_run_measures_nothing_twice_and_ends_the_same(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=1)
    if "start_epoch" in options:
        options = {"start_epoch": None, "phase_steps": 6}
    results: list[Result] = []

    def made() -> TWACallback:
        return make(save_average=False, **options)

    def outcome(path: Path | None = None) -> Any:
        twas: list[TWACallback] = []

        def kept() -> TWACallback:
            twas.append(made())
            return twas[0]

        found = run(tmp_path, Regressor, kept, path, saver=saver if path is None else None)
        result = twas[0].result
        results.append(result)
        found.callback.pop("result", None)  # has seconds
        return found

    whole = outcome()
    paths = sorted((tmp_path / "ck").glob("*=*.ckpt"))
    assert len(paths) >= 20
    for path in sorted(paths, key=lambda path: int(path.stem.split("step=")[1]))[12:-1]:
        assert differences(whole, outcome(path)) == []
        again, first = results[-1], results[0]
        assert (again.losses, again.path, again.accepted) == (
            first.losses,
            first.path,
            first.accepted,
        )


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Noisy(Regressor):
        def __init__(self) -> None:
            super().__init__(batchnorm=True)
            self.register_buffer("calls", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            if not self.training:
                seen.append((torch.is_grad_enabled(), self.net[1].training))
                self.log("measured", 1.0)
                batch[0].add_(torch.rand(()))
            return super().training_step(batch, batch_idx)

    twa, module = make(), Noisy()
    held_out = loader(32, seed=1)
    before = held_out.dataset.tensors[0].clone()
    the_trainer = trainer(tmp_path, callbacks=[twa, Recorder(twa)])
    the_trainer.fit(module, loader(), held_out)
    assert set(seen) == {(False, True)}
    assert "measured" not in the_trainer.logged_metrics
    assert torch.equal(held_out.dataset.tensors[0], before)


def test_the_random_numbers_of_training_are_those_without_measuring(tmp_path: Path) -> None:
    class Dropped(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.drawn.append(float(torch.rand(())))
            return super().training_step(batch, batch_idx)

    drawn = []
    for heldout in ("auto", None):
        L.seed_everything(3, verbose=False)
        module = Dropped()
        module.drawn = []
        fitted(tmp_path, make(heldout=heldout), module)
        drawn.append(module.drawn)
    measured, plain = drawn
    assert [x for x in plain if x not in measured] == []
