"""Averaging weights as bars or a map: the data behind each artist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import Regressor, loader, trainer
from helpers.figures import compared, trained
from helpers.plain import CollectConfig, TWACallback
from lightning_twa import SubspaceConfig, plot_averaging_weights, plot_subspace
from lightning_twa.candidates import decay_curve


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
    twa._run.averaging.learned = torch.full((90, 1), 1 / 90, dtype=torch.float64)
    twa._run.averaging.restored_names = [f"epoch={i}" for i in range(90)]
    (axes,) = plot_averaging_weights(twa).axes
    assert len(axes.patches) == 90
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"epoch={i}" for i in range(0, 90, 4)]
    assert axes.figure.get_figwidth() <= 6.4  # readable at 640 pixels


def test_no_weights_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^There are no averaging weights before the phase"):
        plot_averaging_weights(TWACallback())
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"^There are no averaging weights before the phase"):
        plot_averaging_weights(tmp_path / "epoch=3.ckpt")
    module = Regressor()
    with pytest.raises(ValueError, match=r"^plot_subspace\(\) needs a callback after its phase"):
        plot_subspace(TWACallback(), module, lambda: 0.0)


def test_fixed_averages_are_points_beside_the_bars(tmp_path) -> None:
    twa = compared(tmp_path)
    result = twa.result
    for source in (twa, tmp_path / "epoch=5.ckpt"):
        (axes,) = plot_averaging_weights(source).axes
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(
            twa.averaging_weights[:, 0].tolist()
        )
        shown = [points.get_label() for points in axes.collections]
        names = [label.removesuffix(", chosen") for label in shown]
        others = sorted(result.losses.keys() - {result.start, "uniform"}, key=result.losses.get)
        assert names == list(dict.fromkeys([result.start, "uniform", *others]))[:3]
        assert [label for label in shown if label.endswith(", chosen")] == [shown[0]]
        for name, points in zip(names, axes.collections, strict=True):
            found = torch.zeros(len(twa.candidate_names), dtype=torch.float64)
            for x, y in points.get_offsets().data.tolist():
                found[int(x)] = y
            assert found.tolist() == pytest.approx(reference(twa.candidate_names)[name])
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert {*shown, "the run's average"} == set(labels)
    (axes,) = plot_averaging_weights(tmp_path / "epoch=4.ckpt").axes
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"the average so far", f"uniform average, 1/{len(twa.candidate_names)}"}


def reference(names: list[str]) -> dict[str, list[float]]:
    """The weights that some fixed averages have by their definition."""
    n, own = len(names), [i for i, name in enumerate(names) if name.startswith("epoch=")]
    alone = {name: [float(i == k) for i in range(n)] for k, name in enumerate(names)}
    uniform = [(i in own) / len(own) for i in range(n)]
    last_2 = [(i in own[-2:]) / 2 for i in range(n)]
    curve = [0.0] * n
    for i, share in zip(own, decay_curve(len(own)), strict=True):
        curve[i] = share
    last = {"last weights": [float(i == n - 1) for i in range(n)]}
    return {**alone, **last, "uniform": uniform, "last 2": last_2, "1-sqrt curve": curve}


def test_fixed_averages_are_rows_above_the_map(tmp_path) -> None:
    twa = compared(tmp_path, subspace=SubspaceConfig(blocks="tensor"))
    axes, _ = plot_averaging_weights(twa).axes
    (image,) = axes.images
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows[3:] == twa.block_names
    assert rows[0] == f"{twa.result.start}, chosen"
    expected = reference(twa.candidate_names)
    for row, values in zip(rows[:3], image.get_array()[:3], strict=True):
        assert values.tolist() == pytest.approx(expected[row.removesuffix(", chosen")])
    torch.testing.assert_close(torch.tensor(image.get_array()[3:]), twa.averaging_weights.T)


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

    monkeypatch.setattr("lightning_twa.figures.weights.plot_averaging_weights", fails)
    twa = TWACallback(4, collect=CollectConfig(start=0))
    with pytest.warns(UserWarning, match="^TensorBoard got no figure .*: no fonts$"):
        trainer(
            tmp_path, callbacks=[twa], logger=TensorBoardLogger(tmp_path), log_every_n_steps=1
        ).fit(Regressor(), loader())
    assert twa.phase == "done"
