"""Figures: their axes, labels, and what they need."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from helpers.figures import trained
from helpers.plain import TWACallback
from lightning_twa import Result, plot_averaging_weights, plot_subspace


@pytest.mark.matrix(3)
@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize(
    ("n", "count"), [(2, 1), (6, 1), (60, 1), (3, 2), (6, 14), (60, 48), (60, 100)]
)
def test_no_label_covers_another(n, count, compared) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    twa = TWACallback()
    names = ["uniform", "last 2", "power(0.13)"]
    if compared:
        averages = {name: [1 / n] * n for name in names}
        losses = dict.fromkeys(names, 1.0)
        twa._run.averaging.result = Result(
            heldout="data", losses=losses, averages=averages, start="last 2"
        )
    twa._run.averaging.learned = torch.randn(n, count).double()
    twa._run.averaging.restored_names = [f"epoch={i}" for i in range(n)]
    blocks = [f"encoder.layers.{i}.self_attention.out_proj" for i in range(count)]
    twa._run.averaging.block_names = blocks
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
    if count > 1 and compared:
        rows = [label.get_text() for label in axes.get_yticklabels()]
        assert rows[:3] == ["last 2, chosen", "uniform", "power(0.13)"]
    if count > 1:
        box = figure.axes[1].yaxis.label.get_window_extent()
        assert page.y0 <= box.y0
        assert box.y1 <= page.y1


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
    many._run.averaging.learned = torch.full((60, 1), 1 / 60, dtype=torch.float64)
    many._run.averaging.restored_names = [f"epoch={i}" for i in range(60)]
    small = Figure(figsize=(3, 3)).add_subplot()
    plot_averaging_weights(many, ax=small)
    assert 2 <= len(small.get_xticks()) <= 3 / 0.2


def test_pyplot_is_untouched_and_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import io, sys, torch, lightning_twa\n"
        "twa = lightning_twa.TWACallback()\n"
        "twa._run.averaging.learned = torch.ones(1, 1)\n"
        "twa._run.averaging.restored_names = ['epoch=0']\n"
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
