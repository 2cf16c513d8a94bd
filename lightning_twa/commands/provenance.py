"""What a file that this package wrote says of itself: which average it is, and of what."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_twa.candidates import unique_names
from lightning_twa.words import count

__all__ = [
    "KEY",
    "average_in_words",
    "describe",
    "has_statistics",
    "of_checkpoint",
    "of_metadata",
    "provenance",
    "statistics_in_words",
]

KEY = "lightning_twa"  # in checkpoints, in the metadata of safetensors and of state dicts
KINDS = {"ema": "exponential moving", "weights": "weighted", "wsm": "decay-curve"}
STALE = "averaged with the weights, and do not fit the average (stale)"


def provenance(
    files: Sequence[Path],
    method: str,
    options: Mapping[str, Any],
    weights: Sequence[float] | None,
    batchnorm: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What is written into a file beside an average.

    Args:
        files: That were averaged, oldest first.
        method: Of :func:`~lightning_twa.average`.
        options: Its arguments, those that are ``None`` left out.
        weights: Of each file; ``None`` where the method chooses among them, or tensor by tensor.
        batchnorm: ``{"batches": n}`` where statistics were computed for the average;
            ``{"batches": None}`` where they were not; ``None`` without BatchNorm.
    """
    return {
        "version": version("lightning-twa"),
        "method": method,
        "options": {name: value for name, value in options.items() if value is not None},
        "files": unique_names(files),
        "sizes": [path.stat().st_size for path in files],
        "weights": None if weights is None else [float(w) for w in weights],
        "batchnorm": None if batchnorm is None else dict(batchnorm),
    }


def has_statistics(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has running statistics of BatchNorm."""
    return any(name.rpartition(".")[2] == "running_mean" for name in state)


def of_checkpoint(content: Any) -> dict[str, Any] | None:
    """Of what ``torch.save`` wrote; ``None`` where there is none."""
    if not isinstance(content, Mapping):
        return None
    found = content.get(KEY) if "state_dict" in content else _metadata(content).get(KEY)
    return found if _is_provenance(found) else None


def of_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Of the metadata of a safetensors file; ``None`` where there is none."""
    try:
        found = json.loads(metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return found if _is_provenance(found) else None


def _metadata(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = getattr(content, "_metadata", None)
    return found if isinstance(found, Mapping) else {}


def _is_provenance(value: Any) -> bool:
    """Whether an entry is one that :func:`provenance` makes: the file may be somebody else's."""
    if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
        return False
    files, weights, statistics = (value.get(k) for k in ("files", "weights", "batchnorm"))
    texts = isinstance(files, list) and files and all(isinstance(name, str) for name in files)
    numbers = weights is None or (
        isinstance(weights, list)
        and len(weights) == len(files or ())
        and all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights)
    )
    known = statistics is None or (
        isinstance(statistics, dict)
        and (statistics.get("batches") is None or isinstance(statistics["batches"], int))
    )
    words = all(isinstance(value.get(key), str) for key in ("version", "method"))
    return bool(texts and numbers and known and words)


def describe(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What a provenance says, line by line.

    Args:
        found: From :func:`of_checkpoint` or :func:`of_metadata`.
        tensors: That the file holds.
    """
    method, files, weights = found["method"], found["files"], found["weights"]
    numbers = sum(t.numel() for t in tensors.values())
    lines = [
        f"{average_in_words(method)} {count(len(files), 'file')}, written by lightning-twa "
        f"{found['version']}; coefficients were not trained",
        f"tensors: {len(tensors)}, {numbers:,} numbers",
    ]
    lines += [f"{name}: {str(value)[:80]}" for name, value in found["options"].items()]
    lines.append(f"BatchNorm: {statistics_in_words(found['batchnorm'], len(files), method)}")
    width = max(map(len, files))
    for i, name in enumerate(files):
        weight = "" if weights is None else f"  {weights[i]:+.4f}"
        lines.append(f"  {name:<{width}}{weight}".rstrip())
    return lines


def average_in_words(method: str) -> str:
    """Which average, up to the files that it is of; the greedy soup may have a few of them."""
    if method == "greedy":
        return "the greedy soup out of"
    return f"the {KINDS.get(method, method.replace('_', ' '))} average of"


def statistics_in_words(found: Mapping[str, Any] | None, files: int, method: str) -> str:
    """Of the entry ``batchnorm``, of an average of so many files."""
    if found is None:
        return "none"
    if found.get("batches") is None and method == "power":
        return "statistics of the checkpoint's own weights, which do not fit the average (stale)"
    if found.get("batches") is None and files == 1:
        return "statistics of the file, which fit it"
    if found.get("batches") is None:
        return STALE
    return (
        f"statistics re-estimated for the average over {count(found['batches'], 'training batch')}"
    )
