"""The padded vector: where tensors and blocks start, and how chunks share the tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_twa.subspace import ParameterLayout
from lightning_twa.subspace.directions.tiles import TILE, TILE_GROUPS, Span, pad

SIZES = {"a": TILE + 130, "empty": 0, "b": 5, "c": 3 * TILE, "d": 1, "e": 2 * TILE - 1}


def layout(blocks="global", sizes=SIZES) -> ParameterLayout:
    return ParameterLayout.from_tensors({k: torch.zeros(n) for k, n in sizes.items()}, blocks)


def test_tensors_start_at_groups() -> None:
    padded = pad(layout())
    a = 66 * 128  # 8192 + 130 columns are 65 groups and two columns
    assert padded.starts == (0, a, a, a + 128, a + 128 + 3 * TILE, a + 256 + 3 * TILE)
    assert padded.block_tiles == (slice(0, 7),)
    assert padded.num_tiles == 7
    assert TILE == TILE_GROUPS * 128


def test_blocks_start_at_tiles() -> None:
    padded = pad(layout("tensor"))
    assert padded.starts == tuple(TILE * t for t in (0, 2, 2, 3, 6, 7))
    assert padded.block_tiles == tuple(
        slice(*pair) for pair in itertools.pairwise((0, 2, 2, 3, 6, 7, 9))
    )
    assert padded.num_tiles == 9


@pytest.mark.parametrize("size", [127, 128, 129])
def test_a_full_group_is_not_padded(size) -> None:
    padded = pad(layout(sizes={"a": size, "b": 1}))
    assert padded.starts == (0, 128 if size <= 128 else 256)


@pytest.mark.parametrize("size", [TILE - 1, TILE, TILE + 1])
def test_a_full_tile_is_not_padded(size) -> None:
    assert pad(layout(sizes={"a": size})).num_tiles == (1 if size <= TILE else 2)


def test_spans_are_the_tensors_parts_between_two_positions() -> None:
    padded = pad(layout(sizes={"a": 200, "empty": 0, "b": 5, "c": 300}))
    # a at 0..200, b at 256..261, c at 384..684
    assert list(padded.spans(100, 400, 90)) == [
        Span(0, slice(100, 200), slice(10, 110)),
        Span(2, slice(0, 5), slice(166, 171)),
        Span(3, slice(0, 16), slice(294, 310)),
    ]
    assert list(padded.spans(200, 256, 0)) == []
    assert list(padded.spans(261, 384, 0)) == []


@pytest.mark.parametrize("blocks", ["global", "tensor"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 64])
def test_chunks_have_one_size_and_write_every_column_once(blocks, size) -> None:
    whole = layout(blocks)
    padded = pad(whole)
    chunks = padded.chunks(size)
    assert {chunk.last - chunk.first for chunk in chunks} == {min(size, padded.num_tiles)}
    done = [t for chunk in chunks for t in range(chunk.first + chunk.covered, chunk.last)]
    assert done == list(range(padded.num_tiles))
    written = torch.zeros(whole.numel)
    for chunk in chunks:
        values = torch.full((TILE * (chunk.last - chunk.first),), -1, dtype=torch.long)
        for span in chunk.gather:
            assert span.target.stop <= len(values)
            start = padded.starts[span.tensor] - TILE * chunk.first
            assert span.target.start == start + span.source.start
            values[span.target] = torch.arange(span.source.start, span.source.stop)
        for span in chunk.scatter:
            assert span.target.start >= TILE * chunk.covered
            expected = torch.arange(span.source.start, span.source.stop)
            assert torch.equal(values[span.target], expected), "gathered too"
            written[whole.specs[span.tensor].start + expected] += 1
    assert bool((written == 1).all())


def test_nothing_has_no_chunks() -> None:
    part = ParameterLayout(layout(sizes={"a": 1}).specs[:0], ("global",), torch.float32)
    assert pad(part).num_tiles == 0
    assert pad(part).chunks(64) == []
