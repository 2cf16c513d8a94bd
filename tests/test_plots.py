"""What the figures show is what they say: the data behind each artist, computed anew in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Regressor, loader, mse, regression_data, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    TWACallback,
    plot_averaging_weights,
    plot_subspace,
)


def trained(tmp_path: Path, blocks: Any = "global", **kwargs: Any) -> tuple[TWACallback, Regressor]:
    torch.manual_seed(0)
    module = Regressor(batchnorm=True)
    twa = TWACallback(
        6, collect=CollectConfig(start=0), subspace=SubspaceConfig(blocks=blocks), **kwargs
    )
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], max_epochs=9, enable_checkpointing=True).fit(
        module, loader(), loader(32, seed=1)
    )
    return twa, module


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.double().flatten() for p in parameters.values()])


def test_bars_are_the_averaging_weights(tmp_path) -> None:
    twa, _ = trained(tmp_path)
    for source in (twa, tmp_path / "epoch=8.ckpt"):
        (axes,) = plot_averaging_weights(source).axes
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx(twa.averaging_weights[:, 0].tolist())
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == twa.candidate_names
        uniform = [line for line in axes.lines if line.get_label() == "uniform average, 1/6"]
        assert list(uniform[0].get_ydata()) == pytest.approx([1 / 6, 1 / 6])


def test_a_checkpoint_of_the_phase_has_weights_of_that_moment(tmp_path) -> None:
    twa, _ = trained(tmp_path)
    (axes,) = plot_averaging_weights(tmp_path / "epoch=7.ckpt").axes
    state = torch.load(tmp_path / "epoch=7.ckpt", weights_only=True)["callbacks"]["TWACallback"]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx(state["averaging_weights"][:, 0].tolist())
    assert heights != pytest.approx(twa.averaging_weights[:, 0].tolist())


def test_blocks_are_a_map_centered_at_the_uniform_average(tmp_path) -> None:
    twa, _ = trained(tmp_path, "tensor")
    axes, bar = plot_averaging_weights(twa).axes
    (image,) = axes.images
    torch.testing.assert_close(torch.tensor(image.get_array()), twa.averaging_weights.T)
    low, high = image.get_clim()
    assert (low + high) / 2 == pytest.approx(1 / 6)
    assert low <= float(twa.averaging_weights.min())
    assert high >= float(twa.averaging_weights.max())
    assert [label.get_text() for label in axes.get_yticklabels()] == twa.block_names
    assert "uniform, 1/6" in bar.get_ylabel()


def test_many_candidates_have_few_labels() -> None:
    twa = TWACallback()
    twa._run._learned = torch.full((90, 1), 1 / 90, dtype=torch.float64)
    twa._run._candidate_names = [f"epoch={i}" for i in range(90)]
    (axes,) = plot_averaging_weights(twa).axes
    assert len(axes.patches) == 90
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"epoch={i}" for i in range(0, 90, 3)]


def test_no_weights_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^There are no averaging weights before the phase"):
        plot_averaging_weights(TWACallback())
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"^There are no averaging weights before the phase"):
        plot_averaging_weights(tmp_path / "epoch=3.ckpt")
    module = Regressor()
    with pytest.raises(ValueError, match=r"^plot_subspace\(\) needs a callback after its phase"):
        plot_subspace(TWACallback(), module, lambda: 0.0)


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_the_plane_shows_projections_and_the_loss_at_its_points(tmp_path, blocks) -> None:
    twa, module = trained(tmp_path, blocks)
    x, y = regression_data().tensors
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seen: list[Tensor] = []

    def loss() -> float:
        seen.append(weights(module))
        module.eval()
        return mse(module.net(x), y).item()

    module.train()
    figure = plot_subspace(twa, module, loss, points=5)
    assert module.training
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    axes = figure.axes[0]

    points = torch.stack([flat(c.parameters) for c in twa.candidates])
    center = points.mean(dim=0)
    _, scale, basis = torch.linalg.svd(points - center, full_matrices=False)
    unit = basis[:2] * (scale[:2] / 6**0.5)[:, None]  # one standard deviation

    def project(vectors: Tensor) -> Tensor:
        return (vectors - center) @ unit.T / unit.square().sum(dim=1)

    candidates, start, end = axes.collections[-3:]
    found = torch.tensor(candidates.get_offsets().data)
    signs = (found * project(points)).sum(dim=0).sign()  # of the directions, arbitrary
    torch.testing.assert_close(found, project(points) * signs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(start.get_offsets().data[0]), torch.zeros(2).double(), atol=1e-6, rtol=0
    )
    final = project(weights(module)[None]) * signs
    torch.testing.assert_close(torch.tensor(end.get_offsets().data), final, atol=1e-4, rtol=1e-4)
    (line,) = [line for line in axes.lines if line.get_label() == "phase"]
    path = torch.tensor(line.get_xydata())
    assert len(path) == 14  # before, 12 steps, the result
    torch.testing.assert_close(path[0], torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(path[-1:], final, atol=1e-4, rtol=1e-4)

    # the grid: its corners are the limits of the plane, row by row
    grid = project(torch.stack(seen)) * signs
    xs, ys = grid[:5, 0], grid[::5, 1]
    assert (xs[0], xs[-1]) == pytest.approx(axes.get_xlim(), abs=1e-4)
    assert (ys[0], ys[-1]) == pytest.approx(axes.get_ylim(), abs=1e-4)
    for i, vector in enumerate(seen):  # in the plane, not only above it
        inside = center + (grid[i] * signs) @ unit
        torch.testing.assert_close(vector, inside, atol=1e-4, rtol=1e-4)
    share = (scale[:2].square() / scale.square().sum() * 100).tolist()
    assert f"({share[0]:.0f} % of variance)" in axes.get_xlabel()
    assert f"({share[1]:.0f} % of variance)" in axes.get_ylabel()


def test_an_exception_in_the_loss_leaves_the_model_as_it_was(tmp_path) -> None:
    twa, module = trained(tmp_path)
    before, mode = weights(module), module.training

    def fails() -> float:
        raise RuntimeError("CRASH")

    with pytest.raises(RuntimeError, match="CRASH"):
        plot_subspace(twa, module, fails, points=3)
    assert torch.equal(weights(module), before)
    assert module.training == mode


def test_the_path_of_a_long_phase_is_thinned_out(tmp_path) -> None:
    from lightning_twa.path import MAX_POINTS, AveragingPath

    path, kept = AveragingPath(), torch.empty(0)
    path.record(torch.zeros(2, 1))
    for step in range(1, 5000):
        if path.due():
            path.record(torch.full((2, 1), float(step)))
            kept = path.points[:, 0, 0]
    assert MAX_POINTS // 2 <= len(kept) <= MAX_POINTS
    gaps = kept.diff()
    assert gaps.max() == gaps.min()  # evenly spaced
    other = AveragingPath()
    other.load_state_dict(path.state_dict())
    for step in range(5000, 5200):
        for p in (path, other):
            if p.due():
                p.record(torch.full((2, 1), float(step)))
    assert torch.equal(path.points, other.points)


def test_a_run_without_a_phase_has_no_path(tmp_path) -> None:
    twa = TWACallback(3, solver=SolverConfig(name="uniform"))
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert twa.averaging_path is None
    (axes,) = plot_averaging_weights(twa).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1 / 3] * 3)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path) -> None:
    code = (
        "import sys, torch, lightning_twa\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "twa = lightning_twa.TWACallback()\n"
        "twa._run._learned = torch.ones(1, 1)\n"
        "try:\n    lightning_twa.plot_averaging_weights(twa)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith('Plots need matplotlib: pip install "lightning-twa[plot]"')


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, .tensorboardX.")
def test_tensorboard_gets_the_averaging_weights(tmp_path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="board")]
    twa = TWACallback(4, collect=CollectConfig(start=0))
    trainer(tmp_path, callbacks=[twa], logger=loggers, log_every_n_steps=1).fit(
        Regressor(), loader()
    )
    events = EventAccumulator(str(Path(loggers[1].log_dir)), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["twa/averaging_weights"]
    (image,) = events.Images("twa/averaging_weights")
    assert image.step == 24
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert "twa/lr" in events.Tags()["scalars"]
