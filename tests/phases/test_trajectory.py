"""The path of the phase that a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch

from helpers.common import Regressor, loader, trainer
from helpers.plain import TWACallback
from lightning_twa import SolverConfig, plot_averaging_weights


def test_the_path_of_a_long_phase_is_thinned_out(tmp_path) -> None:
    from lightning_twa.phases.trajectory import MAX_POINTS, Trajectory

    path, kept = Trajectory(), torch.empty(0)
    path.record(torch.zeros(2, 1))
    for step in range(1, 5000):
        if path.due():
            path.record(torch.full((2, 1), float(step)))
            kept = path.points[:, 0, 0]
    assert MAX_POINTS // 2 <= len(kept) <= MAX_POINTS
    gaps = kept.diff()
    assert gaps.max() == gaps.min()  # evenly spaced
    other = Trajectory()
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
