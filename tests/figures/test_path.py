"""The way of the phase over the plane: places computed anew in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from helpers.common import flat
from helpers.figures import compared, trained
from helpers.plain import TWACallback
from lightning_twa import SubspaceConfig, plot_path


def projected(twa: TWACallback, beta: Tensor) -> Tensor:
    """``(2,)`` where an average with weights ``(n,)`` is, by a singular value decomposition."""
    points = torch.stack([flat(c.parameters) for c in twa.candidates]).double()
    centered = points - points.mean(dim=0)
    _, scale, basis = torch.linalg.svd(centered, full_matrices=False)
    unit = basis[:2] * (scale[:2] / len(points) ** 0.5)[:, None]
    return (beta.double() @ centered) @ unit.T / unit.square().sum(dim=1)


def test_everything_is_at_its_place(tmp_path) -> None:
    twa = compared(tmp_path)
    (axes,) = plot_path(twa).axes
    places = {c.get_label(): torch.tensor(c.get_offsets().data) for c in axes.collections}
    signs = (
        (
            places["candidates"]
            * torch.stack([projected(twa, row) for row in torch.eye(len(twa.candidates))])
        )
        .sum(dim=0)
        .sign()
    )  # of the directions, arbitrary
    averages = [name for name in places if name.removesuffix(", chosen") in twa.result.averages]
    assert len(averages) == 3
    assert averages[0] == f"{twa.result.start}, chosen"
    weights = {name: twa.result.averages[name.removesuffix(", chosen")] for name in averages}
    weights["the run's average"] = twa.averaging_weights[:, 0].tolist()
    for i, row in enumerate(torch.eye(len(twa.candidates))):
        torch.testing.assert_close(
            places["candidates"][i], projected(twa, row) * signs, atol=1e-5, rtol=1e-4
        )
    for name, beta in weights.items():
        expected = projected(twa, torch.tensor(beta)) * signs
        torch.testing.assert_close(places[name][0], expected, atol=1e-5, rtol=1e-4)
    (line,) = [line for line in axes.lines if line.get_label() == "phase"]
    way = torch.tensor(line.get_xydata())
    assert len(way) == len(twa.averaging_path)
    for point, beta in zip(way, twa.averaging_path[:, :, 0], strict=True):
        torch.testing.assert_close(point, projected(twa, beta) * signs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_without_held_out_data_the_uniform_average_is_there(tmp_path, blocks) -> None:
    twa, _ = trained(tmp_path, blocks)
    (axes,) = plot_path(twa).axes
    places = {c.get_label(): c.get_offsets().data for c in axes.collections}
    assert places["uniform average"].tolist() == [pytest.approx([0, 0], abs=1e-6)]
    assert places.keys() == {"candidates", "uniform average", "the run's average"}
    names = [text.get_text() for text in axes.texts]
    assert names == [twa.candidate_names[0], twa.candidate_names[-1]]


def test_running_averages_are_not_the_oldest(tmp_path) -> None:
    twa = compared(tmp_path)
    assert twa.candidate_names[0] == "power(0.05)"
    (axes,) = plot_path(twa).axes
    assert [text.get_text() for text in axes.texts] == ["epoch=1", twa.candidate_names[-1]]


def test_without_candidates_and_without_matplotlib(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"^plot_path\(\) needs a callback after its phase"):
        plot_path(TWACallback())
    twa = compared(tmp_path, subspace=SubspaceConfig(bits=4))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'^Plots need matplotlib: pip install "lightning-twa'):
        plot_path(twa)
