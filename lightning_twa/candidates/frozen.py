"""Parameters that are not trained: kept once for all candidates, and not twice in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.copying import to_cpu
from lightning_twa.candidates.taking import take
from lightning_twa.candidates.unchanged import all_same
from lightning_twa.subspace import local_part

__all__ = [
    "FROZEN",
    "changing_part",
    "frozen_part",
    "leave_out_frozen",
    "put_frozen_back",
    "unchanged_names",
]

FROZEN = "frozen"  # name of the candidate that holds what never changes


def frozen_part(module: nn.Module, weights: Mapping[str, Tensor]) -> Candidate:
    """What of a candidate is not trained.

    Args:
        module: The model.
        weights: Values that take the place of the module's, by name of the parameter.
    """
    whole = take(module, FROZEN, {}, weights=weights)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return Candidate(FROZEN, {k: v for k, v in whole.parameters.items() if k not in trained}, {})


def changing_part(
    module: nn.Module,
    name: str,
    buffers: Mapping[str, Tensor],
    frozen: dict[str, Tensor],
    dtype: torch.dtype | None,
    weights: Mapping[str, Tensor],
) -> Candidate:
    """The rest of a candidate: what is trained, and what is frozen and has changed; see
    :class:`Taking`.

    Args:
        module: The model.
        name: Of the candidate.
        buffers: Of it.
        frozen: Parameters of :func:`frozen_part`.
        dtype: What trainable parameters are rounded to.
        weights: Values that take the place of the module's, by name of the parameter.
    """
    whole = take(module, name, buffers, Candidate(FROZEN, frozen, {}), dtype, weights)
    own = {k: v for k, v in whole.parameters.items() if v is not frozen.get(k)}
    return Candidate(name, own, whole.buffers)


def leave_out_frozen(state: Mapping[str, Any], module: nn.Module) -> None:
    """Leave frozen parameters that are as in the module out of the state of a checkpoint, which
    holds them already or, with adapters alone, is not meant to.

    Args:
        state: Of a store; changed in place.
        module: The model.
    """
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    entries = [*state["given"], *state["window"]]
    held = [entry.get("parameters", {}) for entry in entries]
    # A copy that candidates share is compared once
    pairs = {(n, id(t)): (t, frozen[n]) for own in held for n, t in own.items() if n in frozen}
    olds, news = [old for old, _ in pairs.values()], [new for _, new in pairs.values()]
    unchanged = dict(zip(pairs, all_same(olds, news), strict=True))
    for entry, own in zip(entries, held, strict=True):
        for name in [name for name in own if name in frozen]:
            if unchanged[name, id(own[name])]:
                del own[name]
                entry.setdefault("as_in_module", []).append(name)


def unchanged_names(candidates: Iterable[Candidate], module: nn.Module) -> set[str]:
    """Names of the frozen parameters of which all candidates share one copy, which is as in the
    module: an average has nothing to write there.

    Args:
        candidates: One at least.
        module: The model.
    """
    first, *others = candidates
    shared = dict(first.parameters)
    for candidate in others:
        shared = {n: t for n, t in shared.items() if candidate.parameters.get(n) is t}
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    names = [name for name in shared if name in frozen]
    olds, news = [shared[n] for n in names], [local_part(frozen[n]) for n in names]
    return {n for n, is_same in zip(names, all_same(olds, news), strict=True) if is_same}


def put_frozen_back(entries: Iterable[tuple[Candidate, Iterable[str]]], module: nn.Module) -> None:
    """Undo :func:`leave_out_frozen`, once the module has the weights of the checkpoint.

    Args:
        entries: Candidates, each with the names of the parameters that were left out of it.
        module: The model.
    """
    parameters = dict(module.named_parameters())
    copies: dict[str, Tensor] = {}
    for candidate, left_out in entries:
        held = candidate.parameters
        for name in left_out:
            if name in parameters and name not in held:
                if name not in copies:
                    copies[name] = to_cpu(parameters[name])
                held[name] = copies[name]
