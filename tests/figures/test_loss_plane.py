"""The plane shows what it says: the data behind each artist, computed anew in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.common import Regressor, flat, mse, regression_data, weights
from helpers.figures import trained
from helpers.plain import TWACallback
from lightning_twa import SolverConfig, SubspaceConfig, plot_averaging_weights, plot_subspace


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
