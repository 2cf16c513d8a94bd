"""Short runs in other projects' Trainers, each compared with the sum that it should end with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

TOLERANCE = 1e-6  # of the largest weight of a tensor: what float32 can hold, with some room

# By name: what the coefficients start from and end with is chosen by validation data; and a phase
# of a third of the run whose last step is the result, so that learned coefficients are compared.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned": {"heldout": None, "start_epoch": 0.7},
}


def difference(twa: Any, module: torch.nn.Module) -> float:
    """The largest difference of a weight of ``module`` from ``sum_i beta_i w_i`` over candidates,
    in float64, in units of the largest weight of its tensor.

    Raises:
        ValueError: When the run has no result, or coefficients of several blocks.
    """
    beta = twa.averaging_weights
    if twa.phase != "done" or beta is None or beta.shape[1] != 1:
        raise ValueError(f"the run ended in phase {twa.phase!r}, with averaging weights {beta}")
    if not torch.isclose(beta.sum(), torch.ones((), dtype=beta.dtype), atol=1e-6):
        raise ValueError(f"averaging weights sum to {float(beta.sum())}")
    largest, compared = 0.0, 0
    for name, parameter in module.named_parameters():
        if name not in twa.candidates[0].parameters:
            continue  # tied, under its other name
        found = parameter.detach().double().cpu()
        pairs = zip(beta[:, 0], twa.candidates, strict=True)
        expected = sum(b * candidate.parameters[name].double() for b, candidate in pairs)
        scale = float(found.abs().max()) if found.numel() else 0.0
        largest = max(largest, float((found - expected).abs().max()) / max(scale, 1e-12))
        compared += 1
    if not compared:
        raise ValueError("no parameter of the module is among those of the candidates")
    return largest


def compare(
    project: str, callback: Callable[..., Any], fit: Callable[[Any], torch.nn.Module]
) -> None:
    """Run ``fit`` once with each of the settings and print what was compared.

    Args:
        project: The name of its distribution.
        callback: ``TWACallback`` of the package whose Trainer the project uses.
        fit: Takes the callback, trains, and returns the LightningModule.

    Raises:
        SystemExit: With 1, when weights differ.
    """
    right = True
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        twa = callback(**setting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = fit(twa)
        off = difference(twa, module)
        right &= off <= TOLERANCE
        start = getattr(twa.result, "start", None)
        chosen = f", start {start!r}" if start else ""
        print(
            f"{project} {version(project)}, {name}: {twa.num_candidates} candidates{chosen}, "
            f"largest difference {off:.1e}{'' if off <= TOLERANCE else ' TOO LARGE'}"
        )
    if not right:
        raise SystemExit(1)
