"""Averages of low-rank adapters: of their products, brought back to their rank."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.commands import printed
from lightning_twa import average

NAMES = [
    ("q.lora_A.weight", "q.lora_B.weight"),
    ("q.lora_A.default.weight", "q.lora_B.default.weight"),
    ("lora_a.weight", "lora_b.weight"),
    ("e.lora_embedding_A.default", "e.lora_embedding_B.default"),
]
SHAPES = [((2, 5), (7, 2)), ((4, 3, 3, 3), (6, 4, 1, 1)), ((3, 2), (9, 3)), ((4, 6), (1, 4))]


def product(state: dict[str, Tensor], a: str, b: str) -> Tensor:
    return state[b].double().flatten(1) @ state[a].double().flatten(1)


def adapters(a: str, b: str, shapes: Any, n: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            a: torch.randn(*shapes[0], generator=generator),
            b: torch.randn(*shapes[1], generator=generator),
            "head.weight": torch.randn(3, generator=generator),
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.5, -0.25, 0.75]])
def test_it_is_the_nearest_of_the_rank_to_the_averaged_product(names, shapes, weights) -> None:
    ms = adapters(*names, shapes)
    how: dict[str, Any] = {} if weights is None else {"method": "weights", "weights": weights}
    found = average(ms, lora="products", **how)
    shares = weights or [1 / 3] * 3
    whole = sum(w * product(m, *names) for w, m in zip(shares, ms, strict=True))
    rank = shapes[0][0]
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    nearest = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(product(found, *names), nearest, rtol=1e-4, atol=1e-5)
    plain = average(ms, **how)
    assert torch.equal(found["head.weight"], plain["head.weight"])
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in plain.items()}


def test_it_does_not_matter_how_the_factors_are_turned(caplog) -> None:
    (a, b), shapes = NAMES[0], SHAPES[0]
    (one,) = adapters(a, b, shapes, 1)
    turn = torch.linalg.qr(torch.randn(2, 2))[0]
    same = {**one, a: turn.T @ one[a], b: one[b] @ turn}
    expected = product(one, a, b)
    with caplog.at_level("INFO"):
        found = average([one, same], lora="products")
    torch.testing.assert_close(product(found, a, b), expected, rtol=1e-4, atol=1e-5)
    off = float((product(average([one, same]), a, b) - expected).norm() / expected.norm())
    assert off > 0.01
    said = re.search(r"1 LoRA products .* kept to (\S+) % .* been (\S+) % off", caplog.text)
    assert said is not None
    assert float(said[1]) < 1e-3
    assert float(said[2]) == pytest.approx(100 * off, rel=0.1)


def test_shared_factors_make_no_difference() -> None:
    (a, b), shapes = NAMES[0], SHAPES[0]
    ms = [{**m, a: torch.ones(shapes[0]).tril()} for m in adapters(a, b, shapes)]
    products = [product(average(ms, lora=how), a, b) for how in ("factors", "products")]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_left_out_stay() -> None:
    ms = adapters(*NAMES[0], SHAPES[0])
    more = [{**m, **{f"v.{n}": t.clone() for n, t in m.items()}} for m in ms]
    found = average(more, lora="products", exclude="v")
    assert torch.equal(found["v.q.lora_A.weight"], ms[-1]["q.lora_A.weight"])
    assert torch.equal(found["q.lora_B.weight"], average(ms, lora="products")["q.lora_B.weight"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "lora='products' needs pairs of lora_A and lora_B, but Candidate 0 has w, ...."),
        ({"method": "greedy"}, "average(method='greedy') does not use lora='products'."),
    ],
)
def test_where_it_has_no_meaning(how, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        average([{"w": torch.ones(2)}] * 2, lora="products", **how)
    with pytest.raises(ValueError, match=r"^Invalid lora='merged'\. Must be one of 'factors'"):
        average([{"w": torch.ones(2)}] * 2, lora="merged")  # type: ignore[call-overload]


def test_the_command_passes_it_on(tmp_path, capsys) -> None:
    ms = adapters(*NAMES[0], SHAPES[0])
    for i, state in enumerate(ms):
        torch.save(state, tmp_path / f"{i}.pt")
    out = tmp_path / "soup.safetensors"
    printed(capsys, "average", tmp_path / "?.pt", "-o", out, "--lora", "products")
    expected = average(ms, lora="products")
    found = average(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "lora: products\n" in printed(capsys, "inspect", out)
