"""The codec: codes are really packed, and near the quantization optimum."""

from __future__ import annotations

import pytest
import torch

from lightning_twa.subspace.directions.codec import (
    GROUP,
    PLANES,
    dequantize,
    pack,
    quantize,
    unpack,
)
from lightning_twa.subspace.directions.scratch import Scratch

# Root mean square error of the Lloyd-Max quantizer of a standard normal (Max 1960).
LLOYD_MAX = {1: 0.603, 2: 0.343, 3: 0.186, 4: 0.0975, 5: 0.0500, 6: 0.0253, 7: 0.0128, 8: 0.00643}
BITS = pytest.mark.parametrize("bits", range(1, 9))


def round_trip(values: torch.Tensor, bits: int) -> torch.Tensor:
    codes, scales = quantize(values, bits)
    return dequantize(unpack(pack(codes, bits), bits), scales, bits, torch.float64)


def relative(values: torch.Tensor, stored: torch.Tensor) -> float:
    return float((stored - values).norm() / values.norm())


@BITS
def test_error_on_normal_data_is_within_10_percent_of_lloyd_max(bits) -> None:
    values = torch.randn(2000, GROUP, dtype=torch.float64)
    codes, scales = quantize(values, bits)
    error = relative(values, dequantize(codes, scales, bits, torch.float64))
    assert error < 1.1 * LLOYD_MAX[bits]
    assert error > 0.85 * LLOYD_MAX[bits], "better than any quantizer of that many levels can be"


@BITS
@pytest.mark.parametrize("kind", ["laplace", "uniform", "tiny", "huge", "outlier"])
def test_error_is_within_6_percent_of_the_best_scale_of_a_fine_search(bits, kind) -> None:
    values = {
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((50, GROUP)).double(),
        "uniform": torch.rand(50, GROUP, dtype=torch.float64) - 0.5,
        "tiny": 1e-12 * torch.randn(50, GROUP, dtype=torch.float64),
        "huge": 1e12 * torch.randn(50, GROUP, dtype=torch.float64),
        "outlier": torch.cat([torch.randn(50, GROUP - 1), torch.full((50, 1), 20.0)], 1).double(),
    }[kind]
    codes, scales = quantize(values, bits)
    found = (dequantize(codes, scales, bits, torch.float64) - values).square().sum(1)
    half = (2**bits - 1) / 2
    best = torch.full((50,), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.05, 1.2, 300).tolist():
        scale = factor * values.abs().amax(1, keepdim=True) / half
        levels = (values / scale + half).round().clamp(0, 2 * half) - half
        best = torch.minimum(best, (scale * levels - values).square().sum(1))
    assert found.sum() <= 1.12 * best.sum(), (
        f"{float(found.sum() / best.sum()):.3f} of the best error"
    )


@BITS
@pytest.mark.parametrize("shape", [(8,), (3, 64), (2, 5, 16)])
def test_packing_round_trips_and_holds_exactly_the_bits(bits, shape) -> None:
    codes = torch.randint(0, 2**bits, (*shape, GROUP), dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits), codes)
    assert 8 * sum(plane.numel() for plane in planes) == bits * codes.numel()
    assert all(plane.dtype == torch.uint8 for plane in planes)
    assert sum(PLANES[bits]) == bits


@BITS
def test_codes_of_float32_are_as_good_as_those_of_float64_by_plain_arithmetic(bits) -> None:
    """Also in memory that was used before, and of numbers whose squares underflow."""
    scratch = Scratch()
    values = torch.randn(300, GROUP, dtype=torch.float64)
    for factor in (1.0, 1e-15, 1e15, 1e-30):
        scaled = (factor * values).float()
        codes, scales = quantize(scaled, bits, scratch)
        stored = dequantize(codes, scales, bits, torch.float64)
        assert relative(scaled.double(), stored) < 1.1 * LLOYD_MAX[bits]
        nearest = torch.full_like(stored, torch.inf)  # of all levels of each group's scale
        for code in range(2**bits):
            level = scales.double().unsqueeze(-1) * (code - (2**bits - 1) / 2)
            nearest = torch.minimum(nearest, (level - scaled.double()).abs())
        worse = (stored - scaled.double()).abs() - nearest
        assert float(worse.max()) < 1e-5 * float(scaled.abs().max())
        assert torch.equal(codes, quantize(scaled, bits)[0])


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [*((torch.float64, bits) for bits in range(1, 9)), (torch.float32, 1), (torch.float32, 2)],
)
def test_codes_do_not_depend_on_the_rounding_of_values(dtype, bits) -> None:
    """Also of groups of few values, which several scales give exactly."""
    for different in (1, 2, 3, 5, 9, GROUP):
        values = torch.randn(100, different, dtype=dtype)[:, torch.arange(GROUP) % different]
        for factor in (1 + torch.finfo(dtype).eps, 1 - torch.finfo(dtype).eps):
            pairs = zip(quantize(values, bits), quantize(values * factor, bits), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_one_bit_is_sign_times_mean_magnitude() -> None:
    values = torch.randn(8, GROUP, dtype=torch.float64)
    stored = round_trip(values, 1)
    expected = values.sign() * values.abs().mean(1, keepdim=True)
    torch.testing.assert_close(stored, expected, rtol=2**-8, atol=0)


@BITS
def test_groups_of_zeros_stay_zero(bits) -> None:
    values = torch.randn(8, 8, GROUP, dtype=torch.float64)
    values[:, 3] = 0
    stored = round_trip(values, bits)
    assert bool((stored[:, 3] == 0).all())
    assert bool(torch.isfinite(stored).all())


@BITS
def test_empty_input(bits) -> None:
    codes, scales = quantize(torch.zeros(0, 8, GROUP), bits)
    assert codes.shape == (0, 8, GROUP)
    assert unpack(pack(codes, bits), bits).shape == (0, 8, GROUP)
    assert dequantize(codes, scales, bits, torch.float32).shape == (0, 8, GROUP)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad) -> None:
    values = torch.randn(3, GROUP)
    values[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(values, 4)


def test_wrong_bits_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=9\. Must be 1 to 8"):
        quantize(torch.randn(1, GROUP), 9)
    with pytest.raises(ValueError, match="last dimension of values must be 128, got"):
        quantize(torch.randn(1, 100), 4)
