"""Dense directions: rows that are converted a few columns at a time, and gradients that miss."""

from __future__ import annotations

import pytest
import torch
from reference import BF16, CPU, F32, F64, candidates, check_products

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace import ParameterLayout
from lightning_twa.subspace.directions import DenseDirections, Scratch, dense


@pytest.mark.parametrize("columns", [1000, 7001, 21_000])
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_columns_converted_at_a_time_do_not_matter(columns, blocks, monkeypatch) -> None:
    monkeypatch.setattr(dense, "DENSE_COLUMNS", columns)
    check_products(build_subspace(candidates(), SubspaceConfig(bits=16, blocks=blocks)))


def test_16_bits_never_hold_a_whole_tensor_in_full_precision(monkeypatch) -> None:
    monkeypatch.setattr(dense, "DENSE_COLUMNS", 100)
    directions = DenseDirections(
        ParameterLayout.from_tensors({"w": torch.zeros(350)}), 2, BF16, CPU
    )
    parts = list(directions._columns(slice(20, 350)))
    assert [rows.shape[1] for _, rows in parts] == [100, 100, 100, 30]
    assert [part.start for part, _ in parts] == [20, 120, 220, 320]
    assert all(rows.dtype == F32 for _, rows in parts)


def test_full_precision_is_not_copied() -> None:
    directions = DenseDirections(ParameterLayout.from_tensors({"w": torch.zeros(350)}), 2, F32, CPU)
    ((part, rows),) = directions._columns(slice(0, 350))
    assert part == slice(0, 350)
    assert rows.data_ptr() == directions.rows.data_ptr()
    assert directions.path == "dense"


@pytest.mark.parametrize(("stored", "error"), [(F64, 0.0), (F32, 2.5e-8), (BF16, 1.7e-3)])
def test_the_error_is_that_of_rounding(stored, error) -> None:
    layout = ParameterLayout.from_tensors({"w": torch.zeros(4000, dtype=F64)})
    directions = DenseDirections(layout, 2, stored, CPU)
    values = torch.randn(2, 4000, dtype=F64)
    padded = torch.cat([values, torch.full((2, 96), torch.nan, dtype=F64)], dim=1)
    directions.close(directions.write(0, padded, Scratch()))
    found = float((directions.dense() - values).norm() / values.norm())
    assert directions.error == pytest.approx(found, rel=1e-6)
    assert directions.error == pytest.approx(error, rel=0.1)
    assert directions.nbytes == directions.rows.nbytes


def test_the_error_is_of_the_columns_of_all_processes() -> None:
    layout = ParameterLayout.from_tensors({"w": torch.zeros(4, dtype=F64)})
    directions = DenseDirections(layout, 1, BF16, CPU)
    squares = directions.write(0, torch.ones(1, 128, dtype=F64), Scratch())
    directions.close(squares + torch.tensor([1.0, 12.0], dtype=F64))
    assert directions.error == pytest.approx((1 / 16) ** 0.5)


def test_directions_of_zeros_have_no_error() -> None:
    directions = DenseDirections(ParameterLayout.from_tensors({"w": torch.zeros(4)}), 1, F32, CPU)
    directions.close(directions.write(0, torch.zeros(1, 128, dtype=F64), Scratch()))
    assert directions.error == 0.0


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_a_gradient_that_is_missing_counts_as_zero(bits) -> None:
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits, blocks="tensor"))
    specs = subspace.layout.specs
    gradients = [torch.randn(spec.shape) for spec in specs]
    for missing in (0, len(specs) - 1):
        some = [None if i == missing else g for i, g in enumerate(gradients)]
        zeros = [torch.zeros_like(g) if i == missing else g for i, g in enumerate(gradients)]
        assert torch.equal(subspace.project(some), subspace.project(zeros))
    assert not subspace.project([None] * len(specs)).any()
