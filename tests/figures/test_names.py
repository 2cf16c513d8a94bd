"""Long names are shortened in the middle; numbers stay, and no two become the same."""

from __future__ import annotations

import random
import re

import pytest

from lightning_twa.figures.names import MOST, shortened

CASES = {
    "net.0.weight": "net.0.weight",
    "encoder.layers.11.attention.query.weight": "encoder.layers.11…query.weight",
    "base_model.model.model.layers.31.self_attn.q_proj.lora_A.default.weight": (
        "base_model…layers.31…weight"
    ),
    "model.encoder.layer.3.attention.output.dense.weight .. model.encoder.layer.4.norm.bias": (
        "model…3…weight .. model…4…bias"
    ),
    "a" * 80: f"{'a' * 16}…{'a' * 15}",
}


@pytest.mark.parametrize("name", CASES)
def test_words_in_the_middle_go(name) -> None:
    assert shortened([name]) == [CASES[name]]


def test_what_all_names_have_goes_before_what_tells_them_apart() -> None:
    names = [
        f"base_model.model.layers.{i}.self_attn.{kind}_proj.weight"
        for i in range(12)
        for kind in "qkvo"
    ]
    short = shortened(names)
    assert short[0] == "base_model…0…q_proj.weight"
    assert short[-1] == "base_model…11…o_proj.weight"
    assert len(set(short)) == len(names)


def test_names_that_would_be_the_same_get_more_room() -> None:
    names = [f"backbone_of_it.some.further.words.{c}_projection.dense_layer" for c in "abc"]
    short = shortened([*names, "decoder.bias"])
    assert len(set(short)) == 4
    assert all(len(s) < len(n) for s, n in zip(short[:3], names, strict=True))
    assert shortened([names[0], names[0]]) == [shortened(names[:1])[0]] * 2  # of one tensor
    assert shortened([]) == []


def test_no_number_is_lost_and_the_length_is_kept_where_numbers_leave_room() -> None:
    draw = random.Random(0)
    words = ["encoder", "layers", "self_attn", "q_proj", "norm1", "lora_A", "weight", "x", "mlp2d"]
    for _ in range(500):
        parts = [draw.choice([*words, str(draw.randrange(200))]) for _ in range(draw.randint(1, 9))]
        name = ".".join(parts)
        if draw.random() < 0.3:
            name += " .. " + ".".join(draw.choices([*words, "7", "41"], k=4))
        (short,) = shortened([name])
        assert re.findall("[0-9]+", short) == re.findall("[0-9]+", name), name
        assert len(short) <= max(MOST, min(len(name), 60))
        if len(name) > MOST and len(re.findall("[0-9]", name)) <= 4 and " .. " not in name:
            assert len(short) <= MOST, (name, short)
        if len(name) <= MOST:
            assert short == name
