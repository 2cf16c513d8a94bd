"""The plain products with codes against float64, tile by tile, eager and compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import candidates, check_products, use

from lightning_twa import SubspaceConfig, build_subspace


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
