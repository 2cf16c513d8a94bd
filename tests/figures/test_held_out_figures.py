"""Losses on held-out data, as a table and along the path: the data behind each artist."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from helpers.figures import compared, trained
from helpers.plain import TWACallback
from lightning_twa import Result, plot_held_out, plot_loss_path

DRAWN = [plot_held_out, plot_loss_path]


def of(**kwargs: Any) -> TWACallback:
    """A finished run with this result."""
    twa = TWACallback()
    averaging = twa._run.averaging
    averaging.learned = torch.full((2, 1), 0.5, dtype=torch.float64)
    averaging.restored_names = ["epoch=0", "epoch=1"]
    result = {
        "heldout": "the validation data",
        "losses": {"uniform": 2.0, "last weights": 2.5, "last 2": 2.2},
        "path": {4: 1.9, 8: 1.5, 12: 1.7},
        "start": "uniform",
        "accepted": 8,
        "gain": 0.5,
        "gain_error": 0.1,
        "batches": 3,
        "steps": 12,
    }
    averaging.result = Result(**{**result, **kwargs})
    return twa


def test_the_table_is_drawn_best_first(tmp_path) -> None:
    twa = compared(tmp_path)
    for source in (twa, tmp_path / "epoch=5.ckpt"):
        (axes,) = plot_held_out(source).axes
        losses = {**twa.result.losses}
        for step in {max(twa.result.path), twa.result.accepted} - {None}:
            losses[f"learned, step {step}"] = twa.result.path[step]
        expected = sorted(losses.items(), key=lambda row: row[1])
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == [name for name, _ in expected]
        assert [text.get_text() for text in axes.texts] == [f"{x:.5g}" for _, x in expected]
        assert axes.get_xlabel() == f"loss on the validation data, {twa.result.extent}"
        low, high = axes.get_ylim()
        assert low > high  # the best above


def marks(figure: Any) -> list[tuple[float, float, str]]:
    """Place and colour of each mark of the table, from above."""
    from matplotlib.colors import to_hex

    return [
        (*points.get_offsets()[0].tolist(), to_hex(points.get_facecolor()[0]))
        for points in figure.axes[0].collections
        if len(points.get_facecolor())  # an error is a line
    ]


def test_marks_tell_what_was_chosen_and_what_the_result_is() -> None:
    (axes,) = (figure := plot_held_out(of())).axes
    blue, red, grey = "#0072b2", "#d55e00", "#808080"
    found = [mark for mark in marks(figure) if mark[2] in (blue, red, grey)]
    assert found == [
        (1.5, 0, blue),
        (1.7, 1, blue),
        (2.0, 2, red),
        (2.2, 3, grey),
        (2.5, 4, grey),
    ]
    (bar,) = axes.containers
    (segment,) = bar.lines[2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([1.4, 1.6])
    assert axes.get_xlim()[0] < 1.4
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [2.0]
    (axes,) = plot_held_out(of(accepted=None)).axes
    assert not axes.containers
    (axes,) = plot_held_out(of(gain_error=math.nan)).axes
    assert not axes.containers


def test_far_and_infinite_losses_are_at_the_edge_with_their_numbers() -> None:
    losses = {"uniform": 2.0, "last 2": 2.1, "last weights": 80.0, "a": math.nan, "b": math.inf}
    figure = plot_held_out(of(losses=losses))
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.5", "1.7", "2", "2.1", "80", "nan", "inf"]
    xs = [x for x, _, _ in marks(figure)]
    assert xs[:4] == [1.5, 1.7, 2.0, 2.1]
    assert len(set(xs[4:])) == 1
    assert 2.1 < xs[4] < axes.get_xlim()[1] < 3
    (axes,) = plot_held_out(of(losses={"uniform": 2.0}, path={}, accepted=None)).axes
    low, high = axes.get_xlim()
    assert low < 2.0 < high


def test_the_path_is_the_losses_by_step(tmp_path) -> None:
    twa = compared(tmp_path)
    for source in (twa, tmp_path / "epoch=5.ckpt"):
        (axes,) = plot_loss_path(source).axes
        line = axes.lines[0]
        assert dict(zip(*line.get_data(), strict=True)) == twa.result.path
        fixed = {line.get_label(): line.get_ydata()[0] for line in axes.lines[1:]}
        (chosen,) = [label for label in fixed if label.startswith(f"{twa.result.start}, chosen")]
        assert fixed[chosen] == twa.result.losses[twa.result.start]


def test_a_star_is_the_result_with_its_error() -> None:
    (axes,) = plot_loss_path(of()).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["path", "uniform, chosen as start", "the run's result"]
    star = axes.collections[-1]
    assert star.get_offsets().data.tolist() == [[8, 1.5]]
    (bar,) = axes.containers
    (segment,) = bar.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([1.4, 1.6])
    losses = {"uniform": 2.0, "a very long name of a file of a soup, number 17": 1.0}
    path = {4: math.inf, 8: 2.1}
    (axes,) = plot_loss_path(of(losses=losses, path=path, accepted=None)).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["path (1 not finite)", "uniform, chosen as start and result"]
    assert labels[2].endswith("17, best fixed one")
    assert not axes.containers


@pytest.mark.parametrize("draw", DRAWN)
def test_without_held_out_data_the_error_says_why_and_what_to_do(tmp_path, draw) -> None:
    what = r"^There are no losses on held-out data to draw \({}\)\. After the end of a run whose"
    twa, _ = trained(tmp_path)
    with pytest.raises(ValueError, match=what.format(twa.result.reason)):
        draw(twa)
    with pytest.raises(ValueError, match=what.format("the run had no such data, or no phase")):
        draw(tmp_path / "epoch=8.ckpt")
    for early in (TWACallback(), tmp_path / "epoch=7.ckpt", tmp_path / "epoch=3.ckpt"):
        with pytest.raises(ValueError, match=what.format("the phase has not ended yet")):
            draw(early)


def test_where_nothing_is_finite_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"^No point of the phase's path has a finite loss"):
        plot_loss_path(of(path={}, accepted=None))
    with pytest.raises(ValueError, match=r"^No loss on the held-out data is finite"):
        plot_held_out(of(losses={"uniform": math.nan}, path={4: math.inf}, accepted=None))


@pytest.mark.parametrize("draw", DRAWN)
def test_letters_keep_off_the_edge_in_a_figure_of_640_pixels(draw) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    many = {f"runs/a_long_name_of_a_folder/epoch={i}": 2.0 + 0.01 * i for i in range(16)}
    figure = draw(of(losses={"uniform": 2.0, **many}))
    FigureCanvasAgg(figure).draw()
    assert figure.get_figwidth() <= 6.4
    (axes,) = figure.axes
    texts = [*axes.get_yticklabels(), *axes.texts, *axes.get_legend().get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 5
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    rows = [label.get_window_extent() for label in axes.get_yticklabels()]
    rows.sort(key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in pairwise(rows))


def test_the_table_in_text_has_the_same_rows() -> None:
    result = of().result
    assert result is not None
    assert str(result).splitlines()[1:-1] == [
        "  learned, step 8   1.5       result",
        "  learned, step 12  1.7",
        "  uniform           2         chosen",
        "  last 2            2.2",
        "  last weights      2.5",
    ]
    bad = dataclasses.replace(result, losses={"uniform": 2.0, "last 2": math.nan, "a": 3.0})
    assert [row.name for row in bad.rows()][-2:] == ["a", "last 2"]  # whatever their order
