"""The name of a subspace in a file says what it is of."""

from __future__ import annotations

from typing import Any

import torch

from lightning_twa import SubspaceConfig
from lightning_twa.candidates import name_of_subspace
from lightning_twa.subspace import ParameterLayout, cut_evenly, held_everywhere


def test_every_part_of_a_subspace_is_in_its_name() -> None:
    """Where a part changes, the file is not used."""
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}

    def name(**changes: Any) -> str:
        config = SubspaceConfig(bits=changes.get("bits", 4), blocks=changes.get("blocks", "tensor"))
        layout = ParameterLayout.from_tensors(changes.get("tensors", tensors), config.blocks)
        columns = changes.get("columns", held_everywhere(layout, 0, 1))
        mixing = torch.arange(12.0, dtype=torch.float64).view(2, 2, 3) + changes.get("more", 0.0)
        return name_of_subspace(
            config,
            columns,
            mixing.view(changes.get("shape", (2, 2, 3))),
            changes.get("names", ["x", "y", "z"]),
            starts_at_mean=changes.get("starts_at_mean", True),
        )

    layout = ParameterLayout.from_tensors(tensors, "tensor")
    cuts = cut_evenly(layout, 2)
    different = [
        {},
        {"bits": 8},
        {"blocks": "global"},
        {"tensors": {"a": torch.zeros(4, 3), "b": torch.zeros(5)}},
        {"tensors": {"a": torch.zeros(3, 4), "c": torch.zeros(5)}},
        {"tensors": {"b": torch.zeros(5), "a": torch.zeros(3, 4)}},
        {"tensors": {"a": torch.zeros(3, 4).double(), "b": torch.zeros(5)}},
        {"columns": cuts[0]},
        {"columns": cuts[1]},
        {"more": 1e-12},
        {"shape": (2, 3, 2)},
        {"names": ["x", "z", "y"]},
        {"starts_at_mean": False},
    ]
    names = [name(**changes) for changes in different]
    assert len(set(names)) == len(names)
    assert name() == names[0]
