"""Packed directions: groups, padding, chunks, and which products are computed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from reference import candidates, check_products, use
from torch import Tensor

from lightning_twa import SubspaceConfig, build_subspace
from lightning_twa.subspace.directions import TILE, kernels, packed


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
    assert build_subspace(candidates(), SubspaceConfig(bits=4)).stored.path == "tiled"
    monkeypatch.setattr(packed, "COMPILE_ENTRIES", 1000)
    assert build_subspace(candidates(), SubspaceConfig(bits=4)).stored.path == "compiled"


def test_failed_compilation_falls_back_with_one_warning(monkeypatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(kernels, "compiled_kernels", lambda: (broken, broken))
    subspace = use(build_subspace(candidates(), SubspaceConfig(bits=4)), "compiled")
    with pytest.warns(UserWarning, match="could not be compiled.*no C\\+\\+ compiler") as caught:
        check_products(subspace)
    assert len(caught) == 1
    assert subspace.stored.path == "tiled"


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


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "path"), [(1, "tiled"), (4, "compiled")])
def test_a_step_needs_less_than_one_vector_of_the_model_s_length(bits, path, tmp_path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, str(bits), path], capture_output=True, text=True, check=True
    )
    extra, vector = map(int, done.stdout.split())
    assert extra < 0.5 * vector, f"{extra / 1e6:.1f} MB beside vectors of {vector / 1e6:.1f} MB"
