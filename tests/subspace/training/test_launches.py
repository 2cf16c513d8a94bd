"""What a step costs an accelerator's host: operations counted, nothing copied to it or asked for,
on tensors that pretend to be on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.counting import Counted, count, pretended
from lightning_twa import SolverConfig, SubspaceConfig, SubspaceOptimizer
from lightning_twa.subspace import ParameterLayout, Subspace, cut_evenly, held_everywhere
from lightning_twa.subspace.directions import DenseDirections, PackedDirections, kernels, rows
from lightning_twa.subspace.training import exchange, parametrizations

GROUPS = 2  # kernels that a compiled product is allowed to be


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with ExitStack() as stack:
        pretended(stack)
        yield torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled products as so many operations of the right shapes."""

    def product(shape: Any) -> Any:
        def run(*args: Any) -> Tensor:
            like = next(a for a in reversed(args) if isinstance(a, Tensor))
            found = like.new_empty(shape(*args))
            for _ in range(GROUPS):
                found.zero_()
            return found

        return run

    both = (
        product(lambda planes, scales, g, bits: scales.shape[::2]),
        product(lambda planes, scales, x, bits: (*scales.shape[:2], 128)),
    )
    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: both)
    of_rows = (
        product(lambda rows, starts, stops, g: (starts.shape[0], rows.shape[0])),
        product(lambda rows, center, ends, x: center.shape),
    )
    monkeypatch.setattr(rows, "compiled_rows", lambda: of_rows)


def shapes(tensors: int) -> dict[str, tuple[int, ...]]:
    return {f"w{i}": (64, 32) if i % 3 else (64,) for i in range(tensors)}


def optimizer_on(
    device: torch.device,
    *,
    bits: int = 32,
    blocks: Any = "global",
    tensors: int = 62,
    n: int = 60,
    solver: SolverConfig | None = None,
    dtype: torch.dtype = torch.float32,
    share: Any = None,
    total_steps: int | None = 100,
    **config: Any,
) -> SubspaceOptimizer:
    params = {
        name: nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        for name, shape in shapes(tensors).items()
    }
    layout = ParameterLayout.from_tensors(params, blocks)
    columns, how = (None, None) if share is None else share(layout)
    local = layout if columns is None else columns.local
    k = n - 1
    stored: Any
    if bits <= 8:
        stored = PackedDirections(local, k, bits, device)
    else:
        stored = DenseDirections(local, k, torch.float32 if bits == 32 else torch.bfloat16, device)
    stored.prepare(lambda compiled: compiled)
    subspace = Subspace(
        SubspaceConfig(bits=bits, blocks=blocks, **config),
        layout,
        torch.zeros(local.numel, device=device),
        stored,
        torch.zeros(layout.num_blocks, k, n, dtype=torch.float64),
        local,
    )
    return SubspaceOptimizer(
        params.items(), subspace, solver, total_steps=total_steps, exchange=how
    )


def give_gradients(optimizer: SubspaceOptimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)


def counted_step(optimizer: SubspaceOptimizer, closure: Any = None) -> Counted:
    give_gradients(optimizer)
    optimizer.step(closure)  # what is made once
    give_gradients(optimizer)
    return count(lambda: optimizer.step(closure))


long = pytest.mark.long


@pytest.mark.parametrize(
    "tensors", [20, pytest.param(62, marks=long), pytest.param(300, marks=long)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=long)])
@pytest.mark.parametrize(("bits", "limit"), [(32, 60), (16, 60), (4, 120), (1, 120)])
def test_operations_of_a_step_in_one_block(cuda, bits, limit, tensors, dtype) -> None:
    step = counted_step(optimizer_on(cuda, bits=bits, tensors=tensors, dtype=dtype))
    assert step.transfers == []
    assert step.launches <= limit, step.operations


@pytest.mark.parametrize("tensors", [62, pytest.param(161, marks=long)])
@pytest.mark.parametrize(("bits", "limit"), [(32, 240), (16, 240), (4, 480)])
def test_operations_of_a_step_with_a_block_per_tensor(cuda, bits, limit, tensors) -> None:
    step = counted_step(optimizer_on(cuda, bits=bits, tensors=tensors, blocks="tensor"))
    assert step.transfers == []
    assert step.launches <= limit, step.operations


@pytest.mark.parametrize("sam_rho", [0.0, pytest.param(0.1, marks=long)])
@pytest.mark.parametrize("decay", [0.1, pytest.param(0.0, marks=long)])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1}, {"name": "adamw"}, {"name": "sgd", "lr": 0.1}],
    ids=["full matrix", "lr", "adamw", "sgd"],
)
def test_no_solver_asks_the_device(cuda, options, decay, sam_rho) -> None:
    solver = SolverConfig(**options, weight_decay=decay, sam_rho=sam_rho)
    optimizer = optimizer_on(cuda, n=4, tensors=3, solver=solver, blocks="tensor")
    assert counted_step(optimizer, lambda: give_gradients(optimizer)).transfers == []


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
@pytest.mark.parametrize("parametrization", ["simplex", "mask"])
def test_no_parametrization_asks_the_device(parametrization, sam_rho, monkeypatch) -> None:
    """On the meta device, whose tensors have no values either: CUDA that is none has no autograd,
    and meta no generator.
    """
    monkeypatch.setattr(parametrizations, "_uniform", lambda like, seed: torch.rand_like(like))
    optimizer = optimizer_on(
        torch.device("meta"),
        n=6,
        tensors=5,
        solver=SolverConfig(sam_rho=sam_rho),
        blocks="tensor",
        parametrization=parametrization,
    )
    assert counted_step(optimizer, lambda: give_gradients(optimizer)).transfers == []


def averaged(layout: ParameterLayout) -> Any:
    every = cut_evenly(layout, 2)
    return every[0], exchange.Shard(every, averaged=True, device=torch.device("cuda"))


SHARES = {
    "replicate": lambda layout: (
        held_everywhere(layout, 0, 2),
        exchange.Replicate(torch.device("cuda")),
    ),
    "shard": averaged,
    "local": lambda layout: (
        held_everywhere(layout, 0, 1),
        exchange.LocalShards(held_everywhere(layout, 0, 1), device=torch.device("cuda")),
    ),
}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [32, 4])
def test_processes_exchange_and_ask_nothing(cuda, share, bits, monkeypatch) -> None:
    sums = []

    def sum_over_ranks(message: Tensor, device: torch.device) -> Tensor:
        sums.append(message.device.type)
        return message + message

    monkeypatch.setattr(exchange, "sum_over_ranks", sum_over_ranks)
    monkeypatch.setattr(exchange, "rank", lambda: 0)
    monkeypatch.setattr(exchange, "gather_columns", lambda own, rows: rows.zero_())
    step = counted_step(optimizer_on(cuda, bits=bits, tensors=5, share=SHARES[share]))
    assert step.transfers == []
    assert sums == 2 * ["cuda"], "one collective a step"


def test_the_counters_notice_what_they_are_for(cuda) -> None:
    x = torch.zeros(3, device=cuda)
    assert count(lambda: x.cpu()).transfers
    assert count(lambda: (x.view(3, 1), x[1:])).launches == 0
    assert count(lambda: x + 1).launches == 1
    with pytest.raises(Exception, match=r"ata.dependent|_local_scalar_dense|not linked|CUDA error"):
        float(x[0])
