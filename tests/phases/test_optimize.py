"""The phase trains what it says, by the steps of a loop by hand, and nothing else."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from helpers.common import Regressor, loader, mse, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import fit
from lightning_twa import SubspaceConfig, SubspaceOptimizer, build_subspace


def hull_distance(points: list[torch.Tensor], theta: torch.Tensor) -> float:
    """Relative distance of theta from the affine hull of the points."""
    center = torch.stack(points).mean(0)
    span = torch.stack([p - center for p in points]).T
    solution = torch.linalg.lstsq(span, theta - center, driver="gelsd").solution
    return float((theta - center - span @ solution).norm() / theta.norm())


def test_run_ends_with_the_learned_average_of_the_candidates(tmp_path) -> None:
    twa = TWACallback(start_epoch=4)
    module, recorder, _ = fit(tmp_path, twa)
    assert twa.phase == "done"
    assert twa.candidate_names == ["epoch=2", "epoch=3"]
    beta = twa.averaging_weights
    assert beta.shape == (2, 1)
    assert beta.sum().item() == pytest.approx(1, abs=1e-12)
    expected = beta[0, 0] * recorder.epochs[2] + beta[1, 0] * recorder.epochs[3]
    torch.testing.assert_close(weights(module), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(beta, torch.full_like(beta, 0.5)), "nothing was learned"


@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.parametrize("subspace", [SubspaceConfig(), SubspaceConfig(blocks="tensor")])
@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_weights_stay_in_the_affine_hull_after_every_step(tmp_path, data, subspace) -> None:
    twa = TWACallback(start_epoch=4, data=data, subspace=subspace, collect=CollectConfig(start=0))
    module, recorder, _ = fit(tmp_path, twa)
    points = [recorder.epochs[e] for e in range(4)]
    in_phase = [w for phase, w in recorder.steps if phase != "collect"]
    assert len(in_phase) == 2 * (4 if data == "train" else 2)
    if subspace.blocks == "global":
        assert max(hull_distance(points, w) for w in in_phase) < 1e-5
    else:  # each tensor in the hull of its own candidates
        sizes = [p.numel() for p in module.parameters()]
        for w in in_phase:
            for *pts, part in zip(*(p.split(sizes) for p in points), w.split(sizes), strict=True):
                assert hull_distance(list(pts), part) < 1e-5


def test_phase_equals_a_hand_written_loop(tmp_path) -> None:
    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    candidates: list[dict[str, torch.Tensor]] = []

    class Copy(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch < 4:
                named = pl_module.named_parameters()
                candidates.append({n: p.detach().clone() for n, p in named})

    module, _, _ = fit(tmp_path, twa, callbacks=[Copy()])
    model = Regressor()
    optimizer = SubspaceOptimizer(
        model.named_parameters(), build_subspace(candidates), total_steps=8
    )
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            mse(model.net(x), y).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(module))
    assert torch.equal(optimizer.averaging_weights, twa.averaging_weights)


def test_the_phase_starts_with_averaged_buffers(tmp_path) -> None:
    class Buffers(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.zeros(2))
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("cache", torch.full((2,), -torch.inf), persistent=False)
            self.at_the_start: tuple[list[float], int] | None = None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if twa.phase == "optimize" and self.at_the_start is None:
                self.at_the_start = self.level.tolist(), int(self.count)
            self.level += 1.0
            self.count += 1
            return super().training_step(batch, batch_idx)

    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=1))
    module, _, _ = fit(tmp_path, twa, Buffers())
    # 4 steps an epoch: the ends of epochs 1, 2, 3 are after 8, 12 and 16 steps
    assert module.at_the_start == ([12.0, 12.0], 16), "mean of floats, newest of the others"
    assert bool((module.cache == -torch.inf).all())


@pytest.mark.parametrize("bits", [1, 4, 16])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_low_bit_basis_in_a_run(tmp_path, caplog, bits, blocks) -> None:
    subspace = SubspaceConfig(bits=bits, blocks=blocks)
    twa = TWACallback(start_epoch=4, subspace=subspace, collect=CollectConfig(start=0))
    module, recorder, _ = fit(tmp_path, twa, Regressor(batchnorm=True))
    assert twa.phase == "done"
    assert f"{'1 bit' if bits == 1 else f'{bits} bits'}, relative error " in caplog.text
    center = torch.stack([recorder.epochs[e] for e in range(4)]).mean(0)
    steps = [w for phase, w in recorder.steps if phase != "collect"]
    assert not torch.equal(steps[0], steps[-1])
    beta = twa.averaging_weights
    if blocks == "global":
        exact = sum(beta[e, 0] * recorder.epochs[e] for e in range(4))
        error = {1: 0.9, 4: 0.15, 16: 0.004}[bits]
        assert (weights(module) - exact).norm() < error * (exact - center).norm()


def _with(name: str, value: torch.Tensor, trained: bool = True) -> Any:
    module = Regressor()
    setattr(module, name, torch.nn.Parameter(value, requires_grad=trained))
    return module


ODD = {
    "empty": lambda: _with("empty", torch.empty(3, 0)),
    "half": lambda: _with("narrow", torch.zeros(5, dtype=torch.float16)),
    "double": lambda: _with("wide", torch.zeros(5, dtype=torch.float64)),
    "scalar": lambda: _with("scalar", torch.tensor(1.0)),
    "frozen NaN": lambda: _with("unused", torch.full((3,), torch.nan), trained=False),
    "frozen int8": lambda: _with("codes", torch.ones(3, dtype=torch.int8), trained=False),
}


@pytest.mark.matrix(8)
@pytest.mark.parametrize("subspace", [{}, {"bits": 4, "blocks": "tensor"}, {"group_size": 2}])
@pytest.mark.parametrize("kind", ODD)
def test_odd_parameters_have_a_phase(tmp_path, kind, subspace) -> None:
    twa = TWACallback(4, collect=CollectConfig(start=1), subspace=SubspaceConfig(**subspace))
    module, recorder, _ = fit(tmp_path, twa, ODD[kind]())
    assert twa.phase == "done"
    assert recorder.steps[-2][0] == "optimize"
    assert not torch.equal(recorder.steps[-2][1][:6], recorder.steps[-4][1][:6]), "it learns"
    for name, p in module.named_parameters():
        assert bool(torch.isfinite(p.float()).all()) != (name == "unused")
