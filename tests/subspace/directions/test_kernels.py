"""The plain products with codes against float64, tile by tile, eager and compiled."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from reference import F32, F64, candidates, check_products, use
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace.directions import kernels
from lightning_twa.subspace.directions.codec import GROUP, pack

BITS = pytest.mark.parametrize("bits", range(1, 9))
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-12), (F32, 1e-5)])


def stored(bits: int, tiles: int = 3, k: int = 5, groups: int = 16) -> tuple[Any, Tensor, Tensor]:
    """Planes and scales of random codes, and the float64 entries that they mean."""
    codes = torch.randint(0, 2**bits, (tiles, k, groups, GROUP), dtype=torch.uint8)
    scales = torch.rand(tiles, k, groups).bfloat16()
    planes = tuple(plane.transpose(1, 2).contiguous() for plane in pack(codes, bits))
    entries = scales.double()[..., None] * (codes - (2**bits - 1) / 2)
    return planes, scales.transpose(1, 2).contiguous(), entries


def close(found: Tensor, exact: Tensor, rtol: float) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) < rtol


@BITS
@DTYPES
@pytest.mark.parametrize(
    "kernel", [kernels.project_tiles, kernels.project_at_once, kernels.project_by_tile]
)
def test_projecting_is_the_product_with_the_entries(kernel, bits, dtype, rtol) -> None:
    planes, scales, u = stored(bits)
    g = torch.randn(3, 16, GROUP, dtype=dtype)
    found = kernel(planes, scales, g, bits)
    assert found.dtype == dtype
    close(found, torch.einsum("nkmc,nmc->nk", u, g.double()), rtol)


@BITS
@DTYPES
@pytest.mark.parametrize(
    "kernel", [kernels.expand_scaled_tiles, kernels.expand_at_once, kernels.expand_by_tile]
)
def test_expanding_is_the_product_with_the_entries(kernel, bits, dtype, rtol) -> None:
    planes, scales, u = stored(bits)
    x = torch.randn(3, 5, dtype=dtype)
    found = kernel(planes, scales, x, bits)
    assert found.dtype == dtype
    close(found, torch.einsum("nkmc,nk->nmc", u, x.double()), rtol)


def test_what_cannot_be_compiled_whole_is_an_error(monkeypatch) -> None:
    """Uncompiled, the functions would hold every entry as a float."""
    asked = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    kernels.compiled_kernels.cache_clear()
    try:
        both = kernels.compiled_kernels(False)
        assert kernels.compiled_kernels(False) is both, "compiled once"
        planes, scales, u = stored(4)
        g, x = torch.randn(3, 16, GROUP), torch.randn(3, 5)
        for _ in range(2):
            close(both[0](planes, scales, g, 4), torch.einsum("nkmc,nmc->nk", u, g.double()), 1e-5)
            close(both[1](planes, scales, x, 4), torch.einsum("nkmc,nk->nmc", u, x.double()), 1e-5)
    finally:
        kernels.compiled_kernels.cache_clear()
    assert asked == 2 * [{"fullgraph": True, "dynamic": False}]


@pytest.fixture
def compilations(monkeypatch) -> Any:
    """How often torch compiles the kernels, which takes no time here."""
    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append("compiled")
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend=backend, **options))
    kernels.compiled_kernels.cache_clear()
    yield found
    kernels.compiled_kernels.cache_clear()


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=pytest.mark.long) for b in (1, 3))])
def test_any_number_of_directions_is_compiled_in_one_process(
    compilations, bits, accelerator
) -> None:
    """Torch gives a function up at its eighth compilation."""
    project, expand = kernels.compiled_kernels(accelerator)
    for k in (2, 3, 5, 7, 8, 9, 11, 12, 13, 20, 59):
        for tiles in (2, 3):
            planes, scales, u = stored(bits, tiles, k, groups=8)
            g, x = torch.randn(tiles, 8, GROUP), torch.randn(tiles, k)
            exact = torch.einsum("nkmc,nmc->nk", u, g.double())
            close(project(planes, scales, g, bits), exact, 1e-5)
            exact = torch.einsum("nkmc,nk->nmc", u, x.double())
            close(expand(planes, scales, x, bits), exact, 1e-5)
    assert len(compilations) == 2, "one of each for all sizes"


def test_what_prepare_compiles_the_step_does_not_compile_again(compilations) -> None:
    for n in (3, 6):
        subspace = use(build_subspace(candidates(n), SubspaceConfig(bits=4)), "compiled")
        compilations.clear()
        subspace.stored.prepare(lambda compiled: compiled)
        assert len(compilations) == (2 if n == 3 else 0)
        compilations.clear()
        check_products(subspace)
        assert compilations == []
        assert subspace.stored.path == "compiled"


@pytest.mark.parametrize("kernel", [kernels.project_by_tile, kernels.expand_by_tile])
def test_tiles_run_on_one_thread_and_the_number_comes_back_after_an_error(
    kernel, monkeypatch
) -> None:
    found = []

    def broken(*args: Any) -> Tensor:
        found.append(torch.get_num_threads())
        raise RuntimeError("a test asks")

    monkeypatch.setattr(kernels, "_scaled", broken)
    planes, scales, _ = stored(4)
    vector = torch.randn(3, 16, GROUP) if kernel is kernels.project_by_tile else torch.randn(3, 5)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="a test asks"):
        kernel(planes, scales, vector, 4)
    assert found == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.matrix(2)
@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_compiled_products_equal_the_float64_reference(bits) -> None:
    torch._dynamo.reset()
    subspace = use(build_subspace(candidates(), SubspaceConfig(bits=bits)), "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        check_products(subspace)
    assert subspace.stored.path == "compiled", "compiling failed and the test saw the fallback"


def test_tiled_products_leave_the_number_of_threads() -> None:
    torch.set_num_threads(2)
    check_products(build_subspace(candidates(), SubspaceConfig(bits=4)))
    assert torch.get_num_threads() == 2
