"""What the figures show is what they say: the data behind each artist, computed anew in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import Regressor, loader, mse, regression_data, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    TWACallback,
    plot_averaging_weights,
    plot_subspace,
)


def trained(
    tmp_path: Path,
    blocks: Any = "global",
    subspace: SubspaceConfig | None = None,
    module: Regressor | None = None,
    solver: SolverConfig | None = None,
) -> tuple[TWACallback, Regressor]:
    torch.manual_seed(0)
    module = Regressor(batchnorm=True) if module is None else module
    subspace = SubspaceConfig(blocks=blocks) if subspace is None else subspace
    twa = TWACallback(6, collect=CollectConfig(start=0), subspace=subspace, solver=solver)
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
    assert float(twa.averaging_weights.min()) < 0
    assert "line: 0" in bar.get_ylabel()
    assert [list(line.get_ydata()) for line in bar.lines if list(line.get_ydata()) == [0, 0]]


def test_many_candidates_have_few_labels() -> None:
    twa = TWACallback()
    twa._run._learned = torch.full((90, 1), 1 / 90, dtype=torch.float64)
    twa._run._candidate_names = [f"epoch={i}" for i in range(90)]
    (axes,) = plot_averaging_weights(twa).axes
    assert len(axes.patches) == 90
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"epoch={i}" for i in range(0, 90, 3)]


@pytest.mark.parametrize(("n", "count"), [(2, 1), (6, 1), (60, 1), (3, 2), (6, 14), (60, 100)])
def test_no_label_covers_another(n, count) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    twa = TWACallback()
    twa._run._learned = torch.randn(n, count).double()
    twa._run._candidate_names = [f"epoch={i}" for i in range(n)]
    twa._run.block_names = [f"encoder.layers.{i}.self_attention.out_proj" for i in range(count)]
    figure = plot_averaging_weights(twa)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    page = figure.bbox
    for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
        labels = [label for label in axis.get_ticklabels() if label.get_text()]
        turned = labels[0].get_rotation() > 0
        boxes = [label.get_window_extent() for label in labels]
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
        boxes.sort(key=lambda box: getattr(box, low))
        for a, b in pairwise(boxes):
            # boxes of turned labels overlap where their texts do not: compare where they end
            assert getattr(a, high) <= getattr(b, high if turned else low) + 1
    if count > 1:
        box = figure.axes[1].yaxis.label.get_window_extent()
        assert page.y0 <= box.y0
        assert box.y1 <= page.y1


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


def position(twa: TWACallback, module: Regressor) -> Callable[[], tuple[float, float]]:
    """Where the module's weights are in the plane, up to the signs of its axes."""
    points = torch.stack([flat(c.parameters) for c in twa.candidates])
    center = points.mean(dim=0)
    _, scale, basis = torch.linalg.svd(points - center, full_matrices=False)
    unit = basis[:2] * (scale[:2] / len(points) ** 0.5)[:, None]

    def place() -> tuple[float, float]:
        x, y = (weights(module) - center) @ unit.T / unit.square().sum(dim=1)
        return float(x), float(y)

    return place


@pytest.mark.parametrize("far", [False, True])
def test_colours_are_the_loss_at_their_place(tmp_path, far) -> None:
    twa, module = trained(tmp_path)
    place = position(twa, module)
    seen: list[tuple[float, float, float]] = []

    def loss() -> float:
        x, y = place()
        value = 3 * x + y  # between points of the grid, the contours of a line are exact
        value += 1e4 * (far and len(seen) == 48)  # the last corner
        seen.append((x, y, value))
        return value

    figure = plot_subspace(twa, module, loss, points=7, margin=0.4)
    axes, bar = figure.axes
    filled = axes.collections[0]
    x, y = seen[-1][:2]  # of the last point, whose coordinates tell the signs of the axes
    signs = torch.tensor([x * axes.get_xlim()[1], y * axes.get_ylim()[1]]).sign().double()
    levels, found = filled.levels.tolist(), 0
    for low, high, path in zip(levels, levels[1:], filled.get_paths(), strict=False):
        vertices = torch.tensor(path.vertices[path.codes != path.CLOSEPOLY]).reshape(-1, 2)
        values = (vertices.double() * signs) @ torch.tensor([3.0, 1.0]).double()
        inside = (values >= low - 1e-3) & (values <= high + 1e-3)
        assert far or inside.all()
        found += int(inside.sum())
    assert found > 40
    assert bar.get_ylabel() == "loss"
    losses = torch.tensor([value for _, _, value in seen])
    assert filled.extend == ("max" if far else "neither")
    if far:
        assert levels[-1] < 100
    else:
        assert [levels[0], levels[-1]] == pytest.approx([float(losses.min()), float(losses.max())])


def test_a_loss_that_is_not_finite(tmp_path) -> None:
    twa, module = trained(tmp_path)
    answers = iter([float("nan"), float("inf"), *range(14)])
    figure = plot_subspace(twa, module, lambda: float(next(answers)), points=4)
    assert figure.axes[1].get_ylabel() == "loss (grey: not finite)"
    assert figure.axes[0].collections[0].levels[-1] == pytest.approx(13)
    figure = plot_subspace(twa, module, lambda: 2.0, points=3)  # flat
    assert figure.axes[0].collections[0].levels[0] == 2.0
    with pytest.raises(ValueError, match=r"^The loss is finite nowhere on the plane"):
        plot_subspace(twa, module, lambda: float("nan"), points=3)


def test_uncentered_averages_are_projected_too(tmp_path) -> None:
    subspace = SubspaceConfig(basis="orthonormal", blocks="tensor")
    twa, module = trained(tmp_path, subspace=subspace, solver=SolverConfig(lr=0.02))
    sums = twa.averaging_weights.sum(dim=0)
    assert (sums - 1).abs().max() > 1e-3  # else the average is in the span of the centered ones
    axes = plot_subspace(twa, module, lambda: 0.0, points=2).axes[0]
    x, y = axes.collections[-1].get_offsets().data[0]
    assert (abs(x), abs(y)) == pytest.approx([abs(v) for v in position(twa, module)()], rel=1e-3)


def test_a_tensor_that_nobody_trains_is_a_block_and_no_direction(tmp_path) -> None:
    class Unused(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Parameter(torch.ones(3))
            self.net.append(nn.Identity())
            self.net[-1].weight = nn.Parameter(torch.ones(2))

    twa, module = trained(tmp_path, "tensor", module=Unused())
    assert {"before", "net.3.weight"} < set(twa.block_names)
    axes = plot_subspace(twa, module, lambda: 0.0, points=2).axes[0]
    x, y = axes.collections[-1].get_offsets().data[0]
    assert (abs(x), abs(y)) == pytest.approx([abs(v) for v in position(twa, module)()], rel=1e-3)


def test_groups_of_tensors_are_blocks(tmp_path) -> None:
    twa, module = trained(tmp_path, 12)
    assert 1 < len(twa.block_names) < len(list(module.parameters()))
    axes = plot_subspace(twa, module, lambda: 0.0, points=2).axes[0]
    x, y = axes.collections[-1].get_offsets().data[0]
    assert (abs(x), abs(y)) == pytest.approx([abs(v) for v in position(twa, module)()], rel=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(tmp_path, fails) -> None:
    twa, module = trained(tmp_path)
    norm = module.net[1]
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [(p.grad, p.grad.clone()) for p in module.parameters()]
    mean, before, mode = norm.running_mean, module.state_dict(), module.training
    before = {name: tensor.clone() for name, tensor in before.items()}
    x, y = regression_data().tensors
    means: list[Tensor] = []

    def loss() -> float:
        means.append(norm.running_mean.clone())
        value = mse(module.net.train()(x), y)
        value.backward()
        norm.running_mean = norm.running_mean + 1  # another tensor, not only other numbers
        module.train(not mode)
        if fails:
            raise RuntimeError("CRASH")
        return value.item()

    if fails:
        with pytest.raises(RuntimeError, match="CRASH"):
            plot_subspace(twa, module, loss, points=3)
    else:
        plot_subspace(twa, module, loss, points=3)
        assert all(torch.equal(m, before["net.1.running_mean"]) for m in means)  # at each point
    assert norm.running_mean is mean
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(m.training == mode for m in module.modules())
    for parameter, (gradient, values) in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)


def test_axes_of_the_user(tmp_path) -> None:
    from matplotlib.figure import Figure

    twa, module = trained(tmp_path)
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_averaging_weights(twa, ax=left) is figure
    assert plot_subspace(twa, module, lambda: 1.0, points=2, ax=right) is figure
    assert [bar.get_height() for bar in left.patches] == pytest.approx(
        twa.averaging_weights[:, 0].tolist()
    )
    assert "first principal direction" in right.get_xlabel()
    assert len(figure.axes) == 3  # and the colour bar
    many = TWACallback()
    many._run._learned = torch.full((60, 1), 1 / 60, dtype=torch.float64)
    many._run._candidate_names = [f"epoch={i}" for i in range(60)]
    small = Figure(figsize=(3, 3)).add_subplot()
    plot_averaging_weights(many, ax=small)
    assert 2 <= len(small.get_xticks()) <= 3 / 0.2


@pytest.mark.parametrize(
    "arguments", [{"points": 1}, {"points": 2.5}, {"margin": -0.1}, {"margin": float("nan")}]
)
def test_arguments_out_of_range(tmp_path, arguments) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"^Invalid {name}={value}\. Must be "):
        plot_subspace(TWACallback(), Regressor(), lambda: 0.0, **arguments)


def test_another_module_or_a_line_of_candidates(tmp_path) -> None:
    twa, module = trained(tmp_path)
    with pytest.raises(ValueError, match=r"^The candidates have a tensor 'net.1.weight'"):
        plot_subspace(twa, Regressor(), lambda: 0.0)
    first, second, *_ = twa.candidates
    for candidate in twa.candidates[2:]:
        for name, tensor in candidate.parameters.items():
            a, b = first.parameters[name], second.parameters[name]
            tensor.copy_((a + b) / 2)
    with pytest.raises(ValueError, match=r"^The candidates lie on a line"):
        plot_subspace(twa, module, lambda: 0.0)


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    trained(tmp_path)
    state = torch.load(tmp_path / "epoch=8.ckpt", weights_only=True)
    state["callbacks"]["TWACallback"]["averaging_weights"] = torch.ones(2, 1).double()
    torch.save(state, tmp_path / "forged.ckpt")
    with pytest.raises(ValueError, match=r"forged.ckpt: .* is damaged, .*averaging_weights is"):
        plot_averaging_weights(tmp_path / "forged.ckpt")


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


def test_pyplot_is_untouched_and_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import io, sys, torch, lightning_twa\n"
        "twa = lightning_twa.TWACallback()\n"
        "twa._run._learned = torch.ones(1, 1)\n"
        "twa._run._candidate_names = ['epoch=0']\n"
        "before = 'matplotlib.pyplot' in sys.modules  # torchmetrics imports it\n"
        "lightning_twa.plot_averaging_weights(twa).savefig(io.BytesIO())\n"
        "pyplot = sys.modules.get('matplotlib.pyplot')\n"
        "print((pyplot is not None) == before, pyplot is None or pyplot.get_fignums() == [])\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "try:\n    lightning_twa.plot_averaging_weights(twa)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    untouched, error = result.stdout.splitlines()
    assert untouched == "True True"
    assert error.startswith('Plots need matplotlib: pip install "lightning-twa[plot]"')


def test_without_matplotlib_no_loss_is_computed(tmp_path, monkeypatch) -> None:
    twa, module = trained(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    called: list[int] = []
    with pytest.raises(ImportError, match=r'^Plots need matplotlib: pip install "lightning-twa'):
        plot_subspace(twa, module, lambda: called.append(1) or 0.0)
    assert called == []


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


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, .tensorboardX.")
def test_a_figure_that_cannot_be_drawn_does_not_fail_the_run(tmp_path, monkeypatch) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    def fails(*args: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("lightning_twa.plots.plot_averaging_weights", fails)
    twa = TWACallback(4, collect=CollectConfig(start=0))
    with pytest.warns(UserWarning, match="^TensorBoard got no figure .*: no fonts$"):
        trainer(
            tmp_path, callbacks=[twa], logger=TensorBoardLogger(tmp_path), log_every_n_steps=1
        ).fit(Regressor(), loader())
    assert twa.phase == "done"
