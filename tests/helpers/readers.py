"""Small checkpoint files of every kind, and reading them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_twa.candidates import Candidate, persistent_buffers
from lightning_twa.candidates.readers import read_candidate_from


def fresh(**changes: Tensor) -> dict[str, Tensor]:
    """The state of a small model, with two parameters and two buffers."""
    state = {
        "net.0.weight": torch.randn(3, 2, dtype=torch.float64),
        "net.0.bias": torch.randn(3, dtype=torch.float64),
        "net.1.running_mean": torch.randn(3, dtype=torch.float64),
        "net.1.count": torch.randint(1, 99, ()),
    }
    return {**state, **changes}


PARAMETERS = ("net.0.weight", "net.0.bias")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def saved(path: Path, content: Any, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def read(path: Path, state: dict[str, Tensor], parameters: Any = PARAMETERS) -> Candidate:
    """Read a file for a model with other values of a state; only the model's names count."""
    expected = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return read_candidate_from(path, expected, parameters)


def whole(candidate: Candidate) -> dict[str, Tensor]:
    return {**candidate.parameters, **candidate.buffers}


def refused(path: Path, state: dict[str, Tensor], match: str, parameters: Any = PARAMETERS) -> None:
    """Reading is an error that names the file and matches."""
    with pytest.raises(ValueError, match=re.escape(path.name) + ".*" + match):
        read(path, state, parameters)


def tensors_of(module: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    parameters = dict(module.named_parameters())
    return {**parameters, **persistent_buffers(module)}, set(parameters)
