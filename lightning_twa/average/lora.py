"""Averages of low-rank adapters: of what they add to the model, ``B A``, not of ``B`` and ``A``.

``mean(B_i) mean(A_i)`` is not ``mean(B_i A_i)``: it is where all runs share one of the factors, and
near it where they are steps of one run, but adapters that were trained apart may have turned their
factors in any way that leaves the product as it is. The averaged product has up to ``n`` times the
rank; kept is the nearest one of the adapters' own rank (Eckart and Young), so that the file still
fits the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_twa.average.members import Member, State
from lightning_twa.machine import say
from lightning_twa.subspace import in_float64

__all__ = ["average_products", "pairs_of"]

A = re.compile(r"(.*\.|)lora_(embedding_)?[Aa](\..*|)")


def pairs_of(names: Collection[str]) -> list[tuple[str, str]]:
    """Names of the two factors of each adapter: ``lora_A`` with ``lora_B``, whatever is around."""
    found = []
    for name in names:
        match = A.fullmatch(name)
        if match is not None:
            before, embedding, after = match.group(1), match.group(2) or "", match.group(3)
            letter = "B" if "_A" in name[len(before) :] else "b"
            other = f"{before}lora_{embedding}{letter}{after}"
            if other in names:
                found.append((name, other))
    return found


def average_products(
    members: Sequence[Member], factors: Sequence[float], state: State, left_out: Collection[str]
) -> State:
    """Factors of the averaged products, in the place of averaged factors; a message says how much
    that differs.

    Args:
        members: With the same tensors.
        factors: Of each.
        state: Their average, of the factors.
        left_out: Names of those that are not averaged.

    Raises:
        ValueError: Where there are no adapters.
    """
    names = set(state) - set(left_out)
    pairs = pairs_of(names)
    if not pairs:
        raise ValueError(
            f"lora='products' needs pairs of lora_A and lora_B, but {members[0].name} has "
            f"{', '.join(list(state)[:3])}, .... Leave it out, or average the adapters' files."
        )
    states = [member.tensors() for member in members]
    result, missed, wrong, size = dict(state), 0.0, 0.0, 0.0
    for a, b in pairs:
        first = _flat(state[a])
        rank = first.shape[0]
        tall = torch.cat([w * _flat(s[b]) for w, s in zip(factors, states, strict=True)], 1)
        wide = torch.cat([_flat(s[a]) for s in states])
        left, inner_left = torch.linalg.qr(tall)
        right, inner_right = torch.linalg.qr(wide.T)
        u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
        root = values[:rank].sqrt()
        new_b, new_a = left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
        missing = rank - root.numel()  # of a layer that is smaller than its adapter's rank
        new_b = torch.nn.functional.pad(new_b, (0, missing))
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, missing))
        result[a] = new_a.reshape(state[a].shape).to(state[a])
        result[b] = new_b.reshape(state[b].shape).to(state[b])
        apart = tall @ wide - _flat(state[b]) @ first
        missed += float(values[rank:].square().sum())
        size += float(values.square().sum())
        wrong += float(apart.square().sum())
    size = max(size, torch.finfo(torch.float64).tiny)
    say(
        f"TWA: {len(pairs)} LoRA products were averaged, and kept to "
        f"{100 * (missed / size) ** 0.5:.2g} % at their rank (relative norm); the product of "
        f"averaged factors would have been {100 * (wrong / size) ** 0.5:.2g} % off."
    )
    return result


def _flat(tensor: Tensor) -> Tensor:
    """A matrix in float64: ``A``, whose first dimension is the rank, or ``B``, whose last is; of
    convolutions with what they have beside it.
    """
    wide = in_float64(tensor.detach())
    return wide.reshape(wide.shape[0], -1)
