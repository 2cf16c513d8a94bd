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
    return pack(codes, bits), scales, scales.double()[..., None] * (codes - (2**bits - 1) / 2)


def close(found: Tensor, exact: Tensor, rtol: float) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) < rtol


@BITS
@DTYPES
@pytest.mark.parametrize("kernel", [kernels.project_tiles, kernels.project_by_tile])
def test_projecting_is_the_product_with_the_entries(kernel, bits, dtype, rtol) -> None:
    planes, scales, u = stored(bits)
    g = torch.randn(3, 16, GROUP, dtype=dtype)
    found = kernel(planes, scales, g, bits)
    assert found.dtype == dtype
    close(found, torch.einsum("nkmc,nmc->nk", u, g.double()), rtol)


@BITS
@DTYPES
@pytest.mark.parametrize("kernel", [kernels.expand_tiles, kernels.expand_by_tile])
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
        both = kernels.compiled_kernels()
        assert kernels.compiled_kernels() is both, "compiled once"
    finally:
        kernels.compiled_kernels.cache_clear()
    assert both == (kernels.project_tiles, kernels.expand_tiles)
    assert asked == 2 * [{"fullgraph": True, "dynamic": False}]


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
