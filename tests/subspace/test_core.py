"""Bases, gradients, averaging weights and solvers against plain float64 references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from lightning_twa import SolverConfig, Subspace, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace import FullMatrixAdam, build
from lightning_twa.subspace.training.schedules import schedule_factor, schedule_sum

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
BASES = pytest.mark.parametrize("name", ["pca", "candidates", "orthonormal"])
BLOCKS = pytest.mark.parametrize("blocks", ["global", "tensor", 30])


def members(n: int = 5, dtype: torch.dtype = F64) -> list[dict[str, Tensor]]:
    """Candidates around a common point, as training gives them."""
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "scale": (), "none": (0,), "b.weight": (3, 7)}
    start = {k: torch.randn(s, dtype=dtype) for k, s in shapes.items()}
    return [{k: v + 0.1 * torch.randn_like(v) for k, v in start.items()} for _ in range(n)]


def block_columns(subspace: Subspace) -> list[np.ndarray]:
    specs = subspace.layout.specs
    return [
        np.concatenate([np.arange(s.start, s.stop) for s in specs if s.block == b])
        for b in range(subspace.num_blocks)
    ]


def expand(subspace: Subspace, x: Tensor, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    out = {s.name: torch.empty(s.shape, dtype=dtype) for s in subspace.layout.specs}
    subspace.expand(x, list(out.values()))
    return out


# --- bases


@BLOCKS
def test_pca_directions_are_orthogonal_with_unit_deviation_of_the_candidates(blocks) -> None:
    ms = members(6)
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    w = np.stack([reference.flatten(m) for m in ms])
    u = subspace.directions.numpy()
    for columns in block_columns(subspace):
        rows = u[:, columns]
        rows = rows[np.abs(rows).sum(1) > 0]
        centered = w[:, columns] - w[:, columns].mean(0)
        singular = np.linalg.svd(centered, compute_uv=False)
        if len(singular) == 0:
            continue
        singular = singular[singular**2 > 1e-6 * max(singular[0] ** 2, 1e-300)]
        assert len(rows) == len(singular)
        gram = rows @ rows.T
        np.testing.assert_allclose(gram, np.diag(singular**2 / len(ms)), atol=1e-12)
        coordinates = centered @ rows.T / np.diag(gram)
        np.testing.assert_allclose(coordinates.std(0), 1.0, rtol=1e-9)


def test_pca_drops_eigenvalues_below_a_millionth_and_keeps_rank() -> None:
    sizes = [1.0, 0.5, 2e-3, 5e-4]  # squared, the last is below 1e-6 of the first
    q = torch.linalg.qr(torch.randn(40, 4, dtype=F64)).Q
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, 1.0]]).double()
    rows = torch.cat([signs, -signs]) * torch.tensor(sizes, dtype=F64)
    ms = [{"w": row} for row in rows @ q.T]
    assert build_subspace(ms).num_directions == 3
    two = build_subspace(ms, SubspaceConfig(rank=2))
    assert two.num_directions == 2
    torch.testing.assert_close(two.directions.norm(dim=1), torch.tensor(sizes[:2], dtype=F64))


@BLOCKS
def test_candidates_basis_is_the_normalised_centered_candidates(blocks) -> None:
    ms = members()
    subspace = build_subspace(ms, SubspaceConfig(basis="candidates", blocks=blocks))
    w = np.stack([reference.flatten(m) for m in ms])
    for columns in block_columns(subspace):
        centered = w[:, columns] - w[:, columns].mean(0)
        norms = np.linalg.norm(centered, axis=1, keepdims=True)
        expected = np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 0)
        np.testing.assert_allclose(subspace.directions.numpy()[:, columns], expected, atol=1e-12)


def test_orthonormal_basis_is_gram_schmidt_and_its_step_an_orthogonal_projection() -> None:
    ms = members()
    subspace = build_subspace(ms, SubspaceConfig(basis="orthonormal"))
    w = np.stack([reference.flatten(m) for m in ms])
    u = subspace.directions.numpy()
    np.testing.assert_allclose(u @ u.T, np.eye(5), atol=1e-10)
    for i in range(5):  # the i-th direction lies in the span of the first i + 1 candidates
        rest = u[i] - w[: i + 1].T @ np.linalg.lstsq(w[: i + 1].T, u[i], rcond=None)[0]
        assert np.linalg.norm(rest) < 1e-10
    params = {k: nn.Parameter(torch.empty_like(v)) for k, v in ms[0].items()}
    solver = SolverConfig(name="sgd", lr=0.3, momentum=0.0, schedule="constant")
    optimizer = SubspaceOptimizer(params.items(), subspace, solver)
    before = reference.flatten(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    g = reference.flatten({k: p.grad for k, p in params.items()})
    optimizer.step()
    projected = w.T @ np.linalg.lstsq(w.T, g, rcond=None)[0]
    np.testing.assert_allclose(reference.flatten(params), before - 0.3 * projected, atol=1e-10)


@BASES
@BLOCKS
def test_tiles_do_not_matter(name, blocks, monkeypatch) -> None:
    ms, config = members(), SubspaceConfig(basis=name, blocks=blocks)
    whole = build_subspace(ms, config)
    monkeypatch.setattr(build, "TILE_COLUMNS", 4)
    tiled = build_subspace(ms, config)
    torch.testing.assert_close(whole.directions, tiled.directions, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(whole.center, tiled.center, rtol=1e-14, atol=0)


# --- gradients


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net_members(n: int = 5) -> tuple[Net, list[dict[str, Tensor]]]:
    net = Net()
    named = list(net.named_parameters())
    return net, [{k: p.detach() + 0.2 * torch.randn_like(p) for k, p in named} for _ in range(n)]


@BASES
@BLOCKS
def test_gradient_equals_autograd_and_finite_differences(name, blocks) -> None:
    net, ms = net_members()
    subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
    inputs, target = torch.randn(20, 5, dtype=F64), torch.randn(20, 3, dtype=F64)
    u, c = subspace.directions, subspace.center
    block = torch.cat([torch.full((s.stop - s.start,), s.block) for s in subspace.layout.specs])

    def loss(x: Tensor) -> Tensor:
        theta = c + (u * x[:, block.long()]).sum(0)
        state = {s.name: theta[s.start : s.stop].view(s.shape) for s in subspace.layout.specs}
        return (torch.func.functional_call(net, state, inputs) - target).square().mean()

    x = 0.3 * torch.randn(subspace.num_directions, subspace.num_blocks, dtype=F64)
    subspace.expand(x, [p for _, p in net.named_parameters()])
    (net(inputs) - target).square().mean().backward()
    found = subspace.project([p.grad for p in net.parameters()])

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    differences = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = 1e-5
        differences[index] = (loss(x + step) - loss(x - step)) / 2e-5
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_other_dtypes_and_missing_ones(dtype) -> None:
    ms = members(dtype=dtype)
    subspace = build_subspace(ms)
    gradients: list[Any] = [torch.randn(s.shape, dtype=dtype) for s in subspace.layout.specs]
    gradients[1] = None
    zeros = [torch.zeros(7) if g is None else g.double() for g in gradients]
    flat = torch.cat([g.double().reshape(-1) for g in zeros])
    expected = subspace.directions.double() @ flat
    torch.testing.assert_close(subspace.project(gradients)[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 32])
def test_sparse_gradients(bits) -> None:
    ms = [{"w": torch.randn(20, 4)} for _ in range(4)]
    subspace = build_subspace(ms, SubspaceConfig(bits=bits))
    embedding = nn.Embedding(20, 4, sparse=True)
    embedding(torch.tensor([1, 1, 7])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert torch.equal(subspace.project([gradient]), subspace.project([gradient.to_dense()]))


# --- averaging weights


@BASES
@BLOCKS
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_weights_are_the_averaging_weights_times_the_candidates(name, blocks, dtype) -> None:
    ms = members(dtype=dtype)
    subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
    x = torch.randn(subspace.num_directions, subspace.num_blocks, dtype=F64)
    beta = subspace.averaging_weights(x)
    assert beta.shape == (5, subspace.num_blocks)
    if name != "orthonormal":
        torch.testing.assert_close(beta.sum(0), torch.ones(subspace.num_blocks, dtype=F64))
    out = expand(subspace, x, subspace.layout.dtype)
    tolerance = 1e-12 if dtype == F64 else 2e-6
    for spec in subspace.layout.specs:
        terms = [beta[i, spec.block] * m[spec.name].double() for i, m in enumerate(ms)]
        scale = float(sum(t.abs() for t in terms).max()) if spec.stop > spec.start else 1.0
        expected = sum(terms)
        assert isinstance(expected, Tensor)
        difference = (out[spec.name].double() - expected).abs()
        assert difference.numel() == 0 or float(difference.max()) < tolerance * scale


def test_no_coefficients_is_the_uniform_average() -> None:
    ms = members(7, F32)
    subspace = build_subspace(ms)
    x = torch.zeros(subspace.num_directions, 1)
    assert torch.equal(subspace.averaging_weights(x), torch.full((7, 1), 1 / 7, dtype=F64))
    for key, value in expand(subspace, x, F32).items():
        assert torch.equal(value, torch.stack([m[key].double() for m in ms]).mean(0).float())


@BLOCKS
def test_n_minus_one_directions_contain_every_candidate(blocks) -> None:
    ms = members(6, F32)
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    centering = torch.eye(6, dtype=F64) - 1 / 6
    for i in range(6):
        x = torch.zeros(subspace.num_directions, subspace.num_blocks, dtype=F64)
        for b, mixing in enumerate(subspace.mixing):  # centering @ mixing.T @ x = e_i - 1/n
            wanted = centering[:, i]
            x[:, b] = torch.linalg.lstsq(centering @ mixing.T, wanted, driver="gelsd").solution
        for key, value in expand(subspace, x, F32).items():
            assert float((value - ms[i][key]).norm()) <= 1e-5 * float(ms[i][key].norm())


def test_subspace_in_float64_if_any_tensor_is() -> None:
    ms = [{"a": m["a.weight"].float(), "b": m["b.weight"]} for m in members()]
    subspace = build_subspace(ms)
    assert subspace.center.dtype == F64
    a, b = torch.empty(7, 5), torch.empty(3, 7, dtype=F64)
    subspace.expand(torch.zeros(subspace.num_directions, 1), [a, b])
    torch.testing.assert_close(b, torch.stack([m["b"] for m in ms]).mean(0), rtol=1e-15, atol=0)


# --- solvers


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_schedules_follow_their_formulas(schedule, total, warmup) -> None:
    config = SolverConfig(schedule=schedule, warmup=warmup)
    found = [schedule_factor(config, step, total) for step in range(total)]
    expected = [reference.factor(schedule, step, total, warmup) for step in range(total)]
    assert found == pytest.approx(expected)
    assert schedule_sum(config, total) == pytest.approx(sum(expected))
    assert sum(found) > 0


SOLVERS: dict[str, dict[str, Any]] = {
    "default": {},
    "full matrix, decay": {"weight_decay": 0.1, "betas": (0.8, 0.99), "schedule": "linear"},
    "full matrix, lr": {"lr": 0.05, "schedule": "step"},
    "adamw": {"name": "adamw"},
    "adamw, lr": {"name": "adamw", "lr": 0.05, "weight_decay": 0.1, "schedule": "constant"},
    "sgd": {"name": "sgd", "lr": 0.2, "momentum": 0.8, "weight_decay": 0.01},
}


@pytest.mark.parametrize("solver", SOLVERS)
@BLOCKS
def test_a_phase_equals_the_reference_step_by_step(solver, blocks) -> None:
    config = SolverConfig(**SOLVERS[solver])
    net, ms = net_members()
    subspace = build_subspace(ms, SubspaceConfig(blocks=blocks))
    total = 25
    optimizer = SubspaceOptimizer(net.named_parameters(), subspace, config, total_steps=total)
    u, columns = subspace.directions.numpy(), block_columns(subspace)
    k, b = subspace.num_directions, subspace.num_blocks

    def make() -> Any:
        if config.name == "sgd":
            return reference.SGD(k, config.momentum, config.weight_decay)
        kind = reference.AdamW if config.name == "adamw" else reference.FullMatrixAdam
        return kind(k, config.betas, config.weight_decay)

    solvers = [make() for _ in range(b)]
    factors = [reference.factor(config.schedule, t, total, config.warmup) for t in range(total)]
    peak = config.lr if config.lr is not None else (config.radius or 2.0) / sum(factors)
    x, path = np.zeros((k, b)), np.zeros(b)
    for step in range(total):
        inputs, target = torch.randn(8, 5, dtype=F64), torch.randn(8, 3, dtype=F64)
        optimizer.zero_grad()
        (net(inputs) - target).square().mean().backward()
        g = reference.flatten({n: p.grad for n, p in net.named_parameters()})
        optimizer.step()
        lr = peak * factors[step]
        for i in range(b):
            new = solvers[i].step(x[:, i], u[:, columns[i]] @ g[columns[i]], lr)
            length = np.linalg.norm(new - x[:, i])
            if config.lr is None and length > lr:
                new = x[:, i] + (new - x[:, i]) * lr / length
            path[i] += np.linalg.norm(new - x[:, i])
            x[:, i] = new
        np.testing.assert_allclose(optimizer.coefficients.numpy(), x, rtol=1e-7, atol=1e-9)
        assert optimizer.last_lr == pytest.approx(lr)
    np.testing.assert_allclose(optimizer.path_length.numpy(), path, rtol=1e-7)
    if config.lr is None:
        assert path.max() <= (config.radius or 2.0) * (1 + 1e-9)
    theta = {s.name: torch.empty(s.shape, dtype=F64) for s in subspace.layout.specs}
    subspace.expand(torch.tensor(x), list(theta.values()))
    np.testing.assert_allclose(
        reference.flatten(dict(net.named_parameters())), reference.flatten(theta), atol=1e-8
    )


def test_full_matrix_adam_does_not_depend_on_rotation_or_scale_of_the_loss() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q
    gradients = torch.randn(30, 4, 2, dtype=F64)
    results = []
    for turn, scale in ((torch.eye(4, dtype=F64), 1.0), (rotation, 1.0), (rotation, 1e4)):
        x = nn.Parameter(torch.zeros(4, 2, dtype=F64))
        optimizer = FullMatrixAdam([x], lr=0.1)
        for g in gradients:
            x.grad = scale * turn @ g
            optimizer.step()
        results.append(turn.T @ x.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-10)


def test_a_rate_set_from_outside_does_not_change_the_budget() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=8)
    used = []
    for _ in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 7.0
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        used.append(optimizer.last_lr)
    assert sum(used) == pytest.approx(2.0)
    assert float(optimizer.path_length) <= 2.0


def test_a_scheduler_of_the_user_s_can_drive_a_constant_schedule() -> None:
    net, ms = net_members()
    solver = SolverConfig(schedule="constant", lr=0.1)
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), solver)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    used = []
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        scheduler.step()
        used.append(optimizer.last_lr)
    assert used == pytest.approx([0.1, 0.05, 0.025, 0.0125])


# --- a phase


@pytest.mark.parametrize("dtype", [F32, F64])
def test_weights_never_leave_the_affine_hull(dtype) -> None:
    net = Net().to(dtype)
    named = list(net.named_parameters())
    ms = [{k: p.detach() + 0.2 * torch.randn_like(p) for k, p in named} for _ in range(5)]
    optimizer = SubspaceOptimizer(named, build_subspace(ms), total_steps=30)
    w = np.stack([reference.flatten(m) for m in ms])
    center = w.mean(0)
    for _ in range(30):
        optimizer.zero_grad()
        net(torch.randn(9, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
        moved = reference.flatten(dict(named)) - center
        rest = moved - (w - center).T @ np.linalg.lstsq((w - center).T, moved, rcond=None)[0]
        assert np.linalg.norm(rest) < 1e-5 * np.linalg.norm(center)
    assert np.linalg.norm(moved) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupted_phase_goes_on_bitwise(solver, tmp_path) -> None:
    config = SolverConfig(**SOLVERS[solver])
    net, ms = net_members()
    batches = torch.randn(20, 8, 5, dtype=F64)

    def train(optimizer: SubspaceOptimizer, model: Net, some: Tensor) -> None:
        for inputs in some:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    first = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), config, total_steps=20)
    train(first, net, batches[:7])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    train(first, net, batches[7:])
    other = Net()
    second = SubspaceOptimizer(other.named_parameters(), build_subspace(ms), config, total_steps=20)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, other, batches[7:])
    assert torch.equal(first.coefficients, second.coefficients)
    assert all(
        torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)
    )
    assert first.steps == second.steps == 20
    assert torch.equal(first.path_length, second.path_length)


def test_closure_is_called_and_its_loss_returned() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 5, dtype=F64)).square().mean()
        loss.backward()
        return loss

    before = optimizer.coefficients.clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, optimizer.coefficients)


# --- degenerate input


def test_frozen_and_identical_tensors_contribute_nothing_and_no_nan() -> None:
    ms = members(dtype=F32)
    for m in ms:
        m["a.weight"] = ms[0]["a.weight"].clone()
    for name in ("pca", "candidates"):
        for blocks in ("global", "tensor"):
            subspace = build_subspace(ms, SubspaceConfig(basis=name, blocks=blocks))
            assert bool(torch.isfinite(subspace.directions).all())
            assert bool((subspace.directions[:, :35] == 0).all())
            x = torch.randn(subspace.num_directions, subspace.num_blocks)
            assert torch.equal(expand(subspace, x, F32)["a.weight"], ms[0]["a.weight"])


@pytest.mark.filterwarnings("ignore:The 3 candidates are equal up to rounding")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_equal_candidates_make_a_phase_that_does_nothing(dtype) -> None:
    net = Net().to(dtype)
    ms = [{k: p.detach().clone() for k, p in net.named_parameters()} for _ in range(3)]
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(4, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
    for key, parameter in net.named_parameters():
        assert torch.equal(parameter, ms[0][key])
    torch.testing.assert_close(optimizer.averaging_weights, torch.full((3, 1), 1 / 3, dtype=F64))


def test_rounding_of_the_center_is_no_direction_of_candidates_that_lie_close_together() -> None:
    common = torch.randn(10_000)
    ms = [{"w": common + 1e-7 * torch.randn(10_000)} for _ in range(5)]
    subspace = build_subspace(ms)
    assert subspace.num_directions == 4
    assert float(subspace.mixing.sum(-1).abs().max()) < 1e-6, "directions are differences"


def test_equal_pairs_of_candidates_are_kept_finite() -> None:
    first, second = members(2)
    for name in ("pca", "candidates", "orthonormal"):
        subspace = build_subspace([first, second, dict(first)], SubspaceConfig(basis=name))
        assert bool(torch.isfinite(subspace.directions).all())
        assert bool(torch.isfinite(subspace.mixing).all())


def test_tied_parameters_count_once() -> None:
    net = Net()
    net.c = nn.Linear(5, 7, dtype=F64)
    net.c.weight = net.a.weight
    names = [name for name, _ in net.named_parameters()]
    ms = [
        {k: v + torch.randn((), dtype=F64) for k, v in net.state_dict().items()} for _ in range(3)
    ]
    subspace = build_subspace(ms, names=names)
    assert [spec.name for spec in subspace.layout.specs] == names
    SubspaceOptimizer(net.named_parameters(), subspace, total_steps=1)
    assert net.c.weight is net.a.weight


def test_without_any_gradient_nothing_moves_and_no_step_is_counted() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert optimizer.steps == 0
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(bad) -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, bad)
    with pytest.warns(UserWarning, match="step 0 of the TWA phase is not finite"):
        optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


# --- misuse


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_candidate_that_is_not_finite_is_named_with_its_tensor(bad) -> None:
    ms = members()
    ms[2]["a.bias"][3] = bad
    with pytest.raises(ValueError, match=r"Candidate 2, tensor 'a\.bias', holds 1 NaN or infinite"):
        build_subspace(ms)


def test_a_huge_finite_candidate_is_accepted() -> None:
    ms = [{"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), 2e38)}]
    assert bool(torch.isfinite(build_subspace(ms).center).all())


def test_candidates_that_do_not_match_are_named() -> None:
    ms = members()
    del ms[1]["scale"]
    with pytest.raises(ValueError, match="Candidate 1 has no tensor 'scale'"):
        build_subspace(ms)
    ms = members()
    ms[3]["a.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"'a\.bias' with shape \(6,\), but .* \(7,\)"):
        build_subspace(ms)
    with pytest.raises(ValueError, match="has no tensor 'c', which names asks for"):
        build_subspace(members(), names=["c"])


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two candidates, got 1"):
        build_subspace(members(1))
    ms = [{**m, "count": torch.tensor(3)} for m in members()]
    with pytest.raises(TypeError, match=r"'count' has dtype torch\.int64"):
        build_subspace(ms)
    build_subspace(ms, names=["a.bias"])
    with pytest.raises(ValueError, match="no parameter to average"):
        build_subspace([{"none": torch.zeros(0)}] * 2)


def test_mixing_of_other_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixing has shape \(1, 4, 5\), but .* 4 candidates"):
        build_subspace(members(4), mixing=build_subspace(members(5)).mixing)


def test_parameters_that_do_not_match_are_refused() -> None:
    net, ms = net_members()
    subspace = build_subspace(ms)
    with pytest.raises(ValueError, match=r"spans 'b\.bias', which is not among the parameters"):
        SubspaceOptimizer(list(net.named_parameters())[:-1], subspace, total_steps=1)
    with pytest.raises(ValueError, match="Got 3 parameters, but the subspace spans 4"):
        SubspaceOptimizer(list(net.parameters())[:-1], subspace, total_steps=1)
    with pytest.raises(ValueError, match=r"The parameter for 'a\.weight' has shape \(3,\)"):
        SubspaceOptimizer(list(net.parameters())[::-1], subspace, total_steps=1)


def test_unknown_length_and_radius_without_deviations_are_refused() -> None:
    net, ms = net_members()
    with pytest.raises(ValueError, match="total_steps is needed for schedule='cosine'"):
        SubspaceOptimizer(net.named_parameters(), build_subspace(ms))
    with pytest.raises(ValueError, match=r"total_steps=0\. Must be an int >= 1"):
        SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=0)
    normalised = build_subspace(ms, SubspaceConfig(basis="candidates"))
    with pytest.raises(ValueError, match=r"basis='candidates' needs SolverConfig\.lr"):
        SubspaceOptimizer(net.named_parameters(), normalised, total_steps=3)


def test_state_of_another_size_is_refused() -> None:
    net, ms = net_members(5)
    small = SubspaceOptimizer(net.named_parameters(), build_subspace(ms[:3]), total_steps=3)
    large = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=3)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), but this subspace needs \(4, 1\)"):
        large.load_state_dict(small.state_dict())


def test_a_state_does_not_change_with_later_steps() -> None:
    net, ms = net_members()
    optimizer = SubspaceOptimizer(net.named_parameters(), build_subspace(ms), total_steps=5)

    def step() -> None:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step()
    state = optimizer.state_dict()
    before = state["solver"]["state"][0]["exp_avg"].clone()
    step()
    assert torch.equal(state["solver"]["state"][0]["exp_avg"], before)


def test_candidates_that_are_equal_give_a_warning() -> None:
    tensor = torch.randn(3, 4)
    for name in ("pca", "candidates"):
        with pytest.warns(UserWarning, match=r"^The 3 candidates are equal up to rounding"):
            build_subspace([{"w": tensor}] * 3, SubspaceConfig(basis=name))
