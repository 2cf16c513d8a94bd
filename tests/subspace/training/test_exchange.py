"""A step that several processes take together, against one process in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CPU, seeded
from torch import Tensor

from helpers.processes import run
from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer, build_subspace
from lightning_twa.subspace import Columns, ParameterLayout, cut_evenly, held_everywhere
from lightning_twa.subspace.directions import kernels, packed
from lightning_twa.subspace.training import exchange

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
]


def parameters(dtypes: str) -> dict[str, Tensor]:
    """In several memory layouts and dtypes."""
    result = {k: torch.zeros_like(t) for k, t in seeded(0).items()}
    result["a"] = torch.zeros(100, 130).t()
    result["conv"] = result["conv"].contiguous(memory_format=torch.channels_last)
    if dtypes == "bfloat16":
        result = {k: t.bfloat16() for k, t in result.items()}
    elif dtypes == "mixed":
        result["large"] = result["large"].bfloat16()
    return {k: t.requires_grad_() for k, t in result.items()}


def gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    """Sparse ones, ones that this process does not have, and at step 2 none on process 1."""
    found: dict[str, Tensor | None] = {**seeded(100 * (rank + 1) + step)}
    if rank == 1:
        found["conv"] = None
    if step == 2 and rank == 1:
        return dict.fromkeys(found)
    return found


def make_exchange(kind: str, whole: ParameterLayout, rank: int, size: int) -> tuple[Any, Columns]:
    every = cut_evenly(whole, size)
    if kind == "replicate":
        return exchange.Replicate(CPU), held_everywhere(whole, rank, size)
    shard = exchange.Shard(every, averaged=kind == "averaged", device=CPU, bucket=10_000)
    return shard, every[rank]


STEPS = 4
SOLVER = SolverConfig(radius=3.0)


def steps(folder: Path, kind: str, config: SubspaceConfig, dtypes: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    members = [seeded(i) for i in range(5)]
    named = parameters(dtypes)
    # Different machines, different eigenvectors: the first process's are used.
    if rank > 0:
        plain = torch.linalg.eigh
        torch.linalg.eigh = lambda m: (lambda r: (r[0], r[1].roll(1, 0)))(plain(m))  # type: ignore[assignment]
    how, columns = make_exchange(
        kind, ParameterLayout.from_tensors(named, config.blocks), rank, size
    )
    subspace = build_subspace(members, config, columns=columns)
    if rank > 0:
        torch.linalg.eigh = plain  # type: ignore[assignment]
    optimizer = SubspaceOptimizer(named.items(), subspace, SOLVER, total_steps=STEPS, exchange=how)
    history = [[p.detach().clone() for p in named.values()]]
    for step in range(STEPS):
        mine = gradients(rank, step)
        if kind == "averaged":
            everyone = [gradients(r, step) for r in range(size)]
            mine = {k: mean([g[k] for g in everyone]) for k in named}
        for name, parameter in named.items():
            gradient = mine[name]
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        optimizer.step()
        history.append([p.detach().clone() for p in named.values()])
    torch.save(
        {
            "history": history,
            "x": optimizer.coefficients,
            "beta": optimizer.averaging_weights,
            "error": subspace.stored.error,
        },
        folder / f"rank{rank}.pt",
    )


def mean(values: list[Tensor | None]) -> Tensor:
    like = next(v for v in values if v is not None)
    return sum(torch.zeros_like(like) if v is None else v for v in values) / len(values)  # type: ignore[return-value]


def expected(config: SubspaceConfig, size: int) -> tuple[list[list[Tensor]], Tensor, float]:
    """One process in float64 with the mean of the gradients."""
    members = [{k: t.double() for k, t in seeded(i).items()} for i in range(5)]
    named = {k: torch.zeros_like(t).requires_grad_() for k, t in members[0].items()}
    subspace = build_subspace(members, config)
    optimizer = SubspaceOptimizer(named.items(), subspace, SOLVER, total_steps=STEPS)
    history = [[p.detach().clone() for p in named.values()]]
    for step in range(STEPS):
        everyone = [gradients(r, step) for r in range(size)]
        for name, parameter in named.items():
            parameter.grad = mean([g[name] for g in everyone]).double()
        optimizer.step()
        history.append([p.detach().clone() for p in named.values()])
    return history, optimizer.averaging_weights, subspace.stored.error


CONFIGS = {
    "dense": SubspaceConfig(),
    "4 bits": SubspaceConfig(bits=4, blocks=2000),
    "a block per tensor": SubspaceConfig(bits=3, blocks="tensor"),
}


@pytest.mark.matrix(4)
@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["replicate", "shard", "averaged"])
def test_steps_equal_one_process(tmp_path, kind, config, processes) -> None:
    run(steps, processes, tmp_path, kind, CONFIGS[config], "float32")
    reports = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(processes)]
    history, beta, error = expected(CONFIGS[config], processes)
    for report in reports:
        for mine, first in zip(report["history"], reports[0]["history"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
        assert torch.equal(report["beta"], reports[0]["beta"])
        # of all columns, also where a process holds a few of them
        assert report["error"] == pytest.approx(error, rel=1e-4, abs=1e-7)
    for found, exact in zip(reports[0]["history"], history, strict=True):
        a, b = (torch.cat([t.double().reshape(-1) for t in ts]) for ts in (found, exact))
        assert float((a - b).norm() / b.norm()) < 1e-5
    torch.testing.assert_close(reports[0]["beta"], beta, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix(2)
@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["bfloat16", "mixed"])
@pytest.mark.parametrize("kind", ["replicate", "shard"])
def test_parameters_of_low_precision(tmp_path, kind, dtypes) -> None:
    run(steps, 2, tmp_path, kind, CONFIGS["4 bits"], dtypes)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    history, *_ = expected(CONFIGS["4 bits"], 2)
    for mine, other, exact in zip(first["history"], second["history"], history, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        a, b = (torch.cat([t.double().reshape(-1) for t in ts]) for ts in (mine, exact))
        assert float((a - b).norm() / b.norm()) < 2e-2


def no_gradient(folder: Path, kind: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    named = {k: t.requires_grad_() for k, t in seeded(0).items()}
    how, columns = make_exchange(kind, ParameterLayout.from_tensors(named), rank, size)
    subspace = build_subspace([seeded(i) for i in range(3)], columns=columns)
    optimizer = SubspaceOptimizer(named.items(), subspace, total_steps=2, exchange=how)
    before = copy.deepcopy(named)
    optimizer.step()
    assert optimizer.steps == 0
    assert all(torch.equal(named[k], before[k]) for k in named)
    # a gradient that is not finite on one process: all of them skip the step
    for name, parameter in named.items():
        parameter.grad = torch.full_like(parameter, torch.nan if rank == 1 else 1.0)
        assert name in before
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(named[k], before[k]) for k in named)
    (folder / f"passed{rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicate", "shard"])
def test_without_any_gradient_and_with_one_that_is_not_finite_nothing_moves(tmp_path, kind) -> None:
    run(no_gradient, 2, tmp_path, kind)
    assert len(list(tmp_path.glob("passed*"))) == 2


def broken_compiler(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    packed.COMPILE_ENTRIES = 0

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    works: Callable[..., Tensor] = kernels.project_by_tile
    kernels.compiled_kernels = lambda accelerator: (  # type: ignore[assignment]
        (works, kernels.expand_by_tile) if rank == 0 else (broken, broken)
    )
    whole = ParameterLayout.from_tensors(seeded(0))
    columns = held_everywhere(whole, rank, size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be compiled")
        subspace = build_subspace(
            [seeded(i) for i in range(3)], SubspaceConfig(bits=4), columns=columns
        )
    (folder / f"{rank} {subspace.stored.path}").touch()


@pytest.mark.slow
def test_where_one_process_cannot_compile_none_does(tmp_path) -> None:
    run(broken_compiler, 2, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0 tiled", "1 tiled"]


def test_what_is_exchanged_at_a_time_is_bounded() -> None:
    whole = ParameterLayout.from_tensors(seeded(0))
    for processes in (2, 7):
        shard = exchange.Shard(
            cut_evenly(whole, processes), averaged=False, device=CPU, bucket=1000
        )
        rows, width = shard._shape
        assert rows * width <= 1000
        assert (rows, len(shard._buckets)) == (processes, shard._size // width)


# --- several processes played by one, so that every element's way is seen without a group


class Group:
    """Processes whose gradients are equal; each is played in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.rank = size, 0
        self.own: list[Tensor] = []  # every process's columns, for the one that gathers them
        for name, function in (
            ("rank", lambda: self.rank),
            ("world_size", lambda: size),
            ("sum_over_ranks", lambda message, device: message),
            ("reduce_scatter_mean", lambda rows, out: out.copy_(rows[self.rank])),
            ("gather_columns", self.gather),
        ):
            monkeypatch.setattr(exchange, name, function)

    def gather(self, columns: Tensor, rows: Tensor) -> None:
        first = columns.storage_offset()
        for row, own in zip(rows, self.own, strict=True):
            row.copy_(own[first : first + len(columns)])


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("bucket", [1, 1000, 10_000, 1 << 24])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_shards_together_take_the_step_of_one_process(
    processes, bucket, averaged, monkeypatch
) -> None:
    shapes = {"a": (13, 10), "empty": (0, 3), "b": (5,), "c": (2, 8192), "d": (150, 121)}
    if bucket == 1:
        shapes = {"a": (13, 10), "b": (5,)}  # a column at a time
    members = [seeded(i, shapes) for i in range(4)]
    one = build_subspace(members)
    x = torch.randn(3, 1, dtype=torch.float64)
    named = seeded(9, shapes)
    for i, (name, gradient) in enumerate(seeded(10, shapes).items()):
        named[name].grad = None if i == 2 else gradient
    named["a"].grad = named["a"].grad.to_sparse()
    named["a"].data = torch.zeros(10, 13).t()  # not contiguous
    group = Group(monkeypatch, processes)
    every = cut_evenly(one.layout, processes)
    total = torch.zeros(3, 1, dtype=torch.float64)
    shards = []
    for group.rank in range(processes):
        shard = exchange.Shard(every, averaged=averaged, device=CPU, bucket=bucket)
        part = build_subspace(members, columns=every[group.rank], mixing=one.mixing)
        shards.append((shard, part))
        found = shard.project(part, list(named.values()))
        assert found is not None
        total += found
    expected = one.project([p.grad for p in named.values()])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)

    for shard, part in shards:  # what each would give to the others
        own = torch.zeros(shard._size)
        part.expand(x, shard._split(own))
        group.own.append(own)
    theta = [torch.empty(spec.shape) for spec in one.layout.specs]
    one.expand(x, theta)
    for group.rank, (shard, part) in enumerate(shards):
        for parameter in named.values():
            parameter.data.fill_(torch.nan)
        shard.expand(part, x, list(named.values()))
        for parameter, exact in zip(named.values(), theta, strict=True):
            torch.testing.assert_close(parameter.detach(), exact, rtol=1e-6, atol=1e-6)


def test_parameters_of_one_dtype_are_exchanged_in_it(monkeypatch) -> None:
    members = [seeded(i, {"a": (5,), "b": (3,)}) for i in range(3)]
    subspace = build_subspace(members)
    Group(monkeypatch, 1)
    (columns,) = cut_evenly(subspace.layout, 1)
    shard = exchange.Shard([columns], averaged=False, device=CPU)
    carried = []
    monkeypatch.setattr(exchange, "gather_columns", lambda own, rows: carried.append(own.dtype))
    half, full = torch.bfloat16, torch.float32
    x = torch.zeros(2, 1)
    for first, second, expected in ((half, half, half), (half, full, full), (full, full, full)):
        shard.expand(subspace, x, [torch.zeros(5, dtype=first), torch.zeros(3, dtype=second)])
        assert carried.pop() == expected
    assert not carried


@pytest.mark.parametrize("how", ["replicate", "shard", "local"])
def test_a_process_without_gradients_counts_as_zero_where_another_has_some(
    how, monkeypatch
) -> None:
    members = [seeded(i, {"a": (5,), "b": (3,)}) for i in range(3)]
    subspace = build_subspace(members)
    group = Group(monkeypatch, 2 if how == "replicate" else 1)
    columns = held_everywhere(subspace.layout, 0, 1)
    make: Any = {
        "replicate": lambda: exchange.Replicate(CPU),
        "shard": lambda: exchange.Shard(cut_evenly(subspace.layout, 1), averaged=False, device=CPU),
        "local": lambda: exchange.LocalShards(columns, device=CPU),
    }
    exchanged = make[how]()
    parameters = [torch.zeros(5), torch.zeros(3)]
    assert exchanged.project(subspace, parameters) is None
    # the other process's coefficient gradient, and that it has one
    others = torch.tensor([2.0, 6.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr(exchange, "sum_over_ranks", lambda message, device: message + others)
    found = exchanged.project(subspace, parameters)
    assert found.flatten().tolist() == ([1.0, 3.0] if group.size == 2 else [2.0, 6.0])
    parameters[1].grad = torch.ones(3)
    mine = subspace.project([None, torch.ones(3)]).flatten()
    found = exchanged.project(subspace, parameters).flatten()
    torch.testing.assert_close(found, (mine + others[:2]) / group.size)


def test_local_shards_count_each_part_once_and_write_all_of_them(monkeypatch) -> None:
    Group(monkeypatch, 1)
    members = [seeded(i, {"a": (5,), "b": (3,)}) for i in range(3)]
    subspace = build_subspace(members)
    columns = Columns(subspace.layout, subspace.layout, None, (True, False))
    parameters = [Part(torch.zeros(5)), Part(torch.zeros(3))]
    gradients = [torch.randn(5), torch.randn(3)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = Part(gradient)
    shards: Any = exchange.LocalShards(columns, device=CPU)
    found = shards.project(subspace, parameters)
    assert torch.equal(found, subspace.project([gradients[0], None]))
    x = torch.randn(2, 1)
    shards.expand(subspace, x, parameters)
    theta = [torch.empty(5), torch.empty(3)]
    subspace.expand(x, theta)
    assert all(torch.equal(p.part, exact) for p, exact in zip(parameters, theta, strict=True))


class Part:
    """A tensor of which this process holds a part."""

    def __init__(self, part: Tensor) -> None:
        self.part = part
        self.grad: Any = None

    def to_local(self) -> Tensor:
        return self.part


def test_one_process_has_a_gradient_where_any_tensor_has() -> None:
    subspace = build_subspace([seeded(i, {"a": (5,), "b": (3,)}) for i in range(3)])
    parameters = [torch.zeros(5), torch.zeros(3)]
    assert exchange.OneProcess().project(subspace, parameters) is None
    parameters[1].grad = torch.ones(3)
    found = exchange.OneProcess().project(subspace, parameters)
    assert torch.equal(found, subspace.project([None, torch.ones(3)]))
