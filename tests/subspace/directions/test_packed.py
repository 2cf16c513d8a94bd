"""Packed directions: groups, padding, chunks, and which products are computed."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from reference import CPU, F32, F64, candidates, check_products, use
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace import ParameterLayout, stored_bytes
from lightning_twa.subspace.directions import (
    TILE,
    PackedDirections,
    Scratch,
    kernels,
    packed,
    pad,
)
from lightning_twa.subspace.directions.codec import dequantize, quantize


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n", [2, 3])
def test_one_and_two_directions(bits, n) -> None:
    subspace = build_subspace(candidates(n), SubspaceConfig(bits=bits))
    assert subspace.num_directions == n - 1
    check_products(subspace)


@pytest.mark.parametrize("numel", [1, 127, 129, TILE - 1, TILE, TILE + 1, 3 * TILE + 77])
def test_sizes_around_group_and_tile(numel) -> None:
    check_products(build_subspace(candidates(shapes={"w": (numel,)}), SubspaceConfig(bits=4)))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_that_do_not_divide_the_tiles(chunk, monkeypatch) -> None:
    monkeypatch.setitem(packed.CHUNK_TILES, "cpu", chunk)
    for blocks in ("global", "tensor"):
        check_products(build_subspace(candidates(), SubspaceConfig(bits=4, blocks=blocks)))


def test_tensors_of_different_magnitude_do_not_share_a_scale() -> None:
    shapes = {"small": (100,), "large": (100,)}
    members = candidates(shapes=shapes)
    for member in members:
        member["small"] *= 1e-6
    subspace = build_subspace(members, SubspaceConfig(bits=4))
    exact = build_subspace(members).directions[:, :100]
    stored = subspace.directions[:, :100]
    assert float((stored - exact).norm() / exact.norm()) < 0.11


def test_large_bases_are_compiled_and_small_ones_are_not(monkeypatch) -> None:
    layout = ParameterLayout.from_tensors({"w": torch.zeros(3 * TILE - 5)})
    for entries, path in ((6 * TILE, "compiled"), (6 * TILE + 1, "tiled")):
        monkeypatch.setattr(packed, "COMPILE_ENTRIES", entries)
        assert PackedDirections(layout, 2, 4, CPU).path == path
        assert PackedDirections(layout, 2, 4, CPU, path="tiled").path == "tiled"
        assert PackedDirections(layout, 2, 4, CPU, path="compiled").path == "compiled"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_the_path_of_compiled_products_with_the_functions_as_they_are(
    bits, blocks, monkeypatch
) -> None:
    plain = (kernels.project_tiles, kernels.expand_scaled_tiles)
    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: plain)
    monkeypatch.setitem(packed.CHUNK_TILES, "cpu", 2)
    subspace = build_subspace(candidates(), SubspaceConfig(bits=bits, blocks=blocks))
    check_products(use(subspace, "compiled"))
    assert subspace.stored.path == "compiled"


def test_failed_compilation_falls_back_with_one_warning(monkeypatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: (broken, broken))
    subspace = use(build_subspace(candidates(), SubspaceConfig(bits=4)), "compiled")
    with pytest.warns(UserWarning, match="could not be compiled.*no C\\+\\+ compiler") as caught:
        check_products(subspace)
    assert len(caught) == 1
    assert subspace.stored.path == "tiled"


def prepared(path: str, answer: bool, chunk: int = 2) -> tuple[PackedDirections, list[bool]]:
    layout = ParameterLayout.from_tensors({"w": torch.zeros(5 * TILE)})
    directions = PackedDirections(layout, 3, 4, CPU, path=path)
    asked = []

    def agree(value: bool) -> bool:
        asked.append(value)
        return answer

    directions.prepare(agree)
    return directions, asked


def test_kernels_are_compiled_before_the_first_step_for_the_shapes_of_a_chunk(monkeypatch) -> None:
    shapes = []

    def kernel(planes: Any, scales: Tensor, vector: Tensor, bits: int) -> Tensor:
        shapes.append((scales.shape, vector.shape, vector.dtype, bits))
        return vector

    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: (kernel, kernel))
    monkeypatch.setitem(packed.CHUNK_TILES, "cpu", 2)
    directions, asked = prepared("compiled", True)
    assert asked == [True]
    assert directions.path == "compiled"
    groups, float32 = (2, 64, 3), torch.float32
    assert shapes == [
        (groups, (2, 64, 128), float32, 4),  # project: a gradient
        (groups, (2, 3), float32, 4),  # expand: coefficients
    ]


def test_where_another_process_cannot_compile_this_one_does_not(monkeypatch) -> None:
    monkeypatch.setattr(
        kernels, "compiled_kernels", lambda accelerator: 2 * (lambda *args: args[2],)
    )
    assert prepared("compiled", False)[0].path == "tiled"


def test_what_is_not_to_be_compiled_is_not(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: pytest.fail("compiles"))
    directions, asked = prepared("tiled", True)
    assert (directions.path, asked) == ("tiled", [False])


def test_failing_to_compile_is_what_the_others_hear(monkeypatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(kernels, "compiled_kernels", lambda accelerator: (broken, broken))
    with pytest.warns(UserWarning, match="could not be compiled"):
        directions, asked = prepared("compiled", False)
    assert (directions.path, asked) == ("tiled", [False])


# --- what is written


def round_trip(groups: Tensor, bits: int) -> Tensor:
    codes, scales = quantize(groups.contiguous(), bits)
    return dequantize(codes, scales, bits, F64)


def written(
    sizes: list[int], values: list[Tensor], bits: int, dtype: torch.dtype = F64, seed: int = 0
) -> PackedDirections:
    """Directions of tensors with these values, their tiles written in an order of chance."""
    tensors = {f"w{i}": torch.zeros(size, dtype=dtype) for i, size in enumerate(sizes)}
    layout = ParameterLayout.from_tensors(tensors)
    directions = PackedDirections(layout, values[0].shape[0], bits, CPU)
    tiles = list(enumerate(pad(layout).spans_of_tiles()))
    random.Random(seed).shuffle(tiles)
    squares, scratch = torch.zeros(2, dtype=F64), Scratch()
    for tile, spans in tiles:
        width = -(-spans[-1].target.stop // 128) * 128
        given = torch.full((values[0].shape[0], width), 99.0, dtype=dtype)
        for span in spans:
            given[:, span.target] = values[span.tensor][:, span.source]
        squares += directions.write(tile, given, scratch)
    directions.close(squares)
    return directions


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [1, 3, 127])
def test_padding_does_not_pull_the_scale_of_a_tensor_s_last_group(bits, size) -> None:
    """It is as if the group were full of the tensor's own entries."""
    whole = torch.randn(4, 128, dtype=F64)
    rest = 2 + torch.rand(4, size, dtype=F64)  # zeros among them would need a much larger range
    directions = written([128 + size], [torch.cat([whole, rest], dim=1)], bits)
    copies = rest[:, torch.arange(128) % size]
    expected = torch.cat([round_trip(whole, bits), round_trip(copies, bits)[:, :size]], dim=1)
    assert torch.equal(directions.dense(), expected)


def test_a_tensor_that_fills_its_last_group_is_left_as_it_is() -> None:
    values = torch.randn(4, 2 * 128, dtype=F64)
    directions = written([256], [values], 4)
    expected = round_trip(values.view(4, 2, 128), 4).flatten(1)
    assert torch.equal(directions.dense(), expected)


SIZES = [TILE + 130, 0, 5, 3 * TILE, 0, 1, 2 * TILE - 1]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_in_which_order_tiles_arrive_does_not_matter(dtype, seed) -> None:
    values = [torch.randn(2, size, dtype=F64) for size in SIZES]
    one, other = (written(SIZES, values, 3, dtype, s) for s in (0, seed))
    assert torch.equal(one.dense(), other.dense())
    assert all(map(torch.equal, one.planes, other.planes))
    assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (F64, 1e-9)])
def test_the_error_counts_each_column_once_and_no_padding(bits, dtype, tolerance) -> None:
    values = [torch.randn(2, size, dtype=F64) for size in SIZES]
    directions = written(SIZES, values, bits, dtype)
    exact = torch.cat(values, dim=1)
    found = float((directions.dense().double() - exact).norm() / exact.norm())
    assert directions.error == pytest.approx(found, rel=tolerance)


def test_groups_of_padding_are_zero() -> None:
    directions = written([TILE + 130], [torch.randn(2, TILE + 130, dtype=F64)], 4)
    assert bool((directions.scales[0] != 0).all())
    assert bool((directions.scales[1, :2] != 0).all())
    assert bool((directions.scales[1, 2:] == 0).all())


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_tensors_that_are_not_contiguous_are_written_over_several_chunks(
    chunk, monkeypatch
) -> None:
    monkeypatch.setitem(packed.CHUNK_TILES, "cpu", chunk)
    members = [{"w": torch.randn(200, 150), "v": torch.randn(100, 90)} for _ in range(4)]
    subspace = build_subspace(members, SubspaceConfig(bits=4))
    x = torch.randn(3, 1)
    plain = [torch.empty(200, 150), torch.empty(100, 90)]
    other = [torch.empty(150, 200).T, torch.empty(100, 90, dtype=torch.bfloat16)]
    subspace.expand(x, plain)
    subspace.expand(x, other)
    assert torch.equal(plain[0], other[0])
    assert torch.equal(plain[1].bfloat16(), other[1])


@pytest.mark.parametrize("bits", [*range(1, 9), 16, 32])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_bytes_are_known_before_there_are_directions(bits, dtype) -> None:
    subspace = build_subspace(candidates(dtype=dtype), SubspaceConfig(bits=bits, blocks="tensor"))
    expected = stored_bytes(subspace.layout, subspace.num_directions, bits)
    assert subspace.stored.nbytes == expected
    assert subspace.nbytes == expected + subspace.center.nbytes


STEP_SCRIPT = """
import resource, sys
import torch
from lightning_twa.subspace.directions import DenseDirections, PackedDirections
from lightning_twa.subspace.layout import ParameterLayout

torch.set_num_threads(1)
bits, path = int(sys.argv[1]), sys.argv[2]
k = 16

def run(size, count):
    weights = {f"w{i}": torch.ones(size) for i in range(count)}
    gradients = [torch.ones(size) for _ in range(count)]
    layout = ParameterLayout.from_tensors(weights)
    center = torch.ones(layout.numel)
    cpu = torch.device("cpu")
    if bits == 32:
        stored = DenseDirections(layout, k, torch.float32, cpu)
        stored.rows.fill_(1.0)
    else:
        stored = PackedDirections(layout, k, bits, cpu, path=path)
        for plane in stored.planes:
            plane.fill_(3)
        stored.scales.fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = stored.project(gradients)
    stored.expand(x, center, list(weights.values()))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

run(300_000, 2)  # imports, compiling: the chunk of tiles is the same
print(run(1_000_000, 12), 4 * 12_000_000)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "path"), [pytest.param(1, "tiled", marks=pytest.mark.long), (4, "compiled")]
)
def test_a_step_needs_less_than_one_vector_of_the_model_s_length(bits, path, tmp_path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, str(bits), path], capture_output=True, text=True, check=True
    )
    extra, vector = map(int, done.stdout.split())
    assert extra < 0.5 * vector, f"{extra / 1e6:.1f} MB beside vectors of {vector / 1e6:.1f} MB"
