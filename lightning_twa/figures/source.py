"""What figures are drawn of: a callback, or the checkpoint of its run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_twa.checkpoint import read_state
from lightning_twa.results import Result, RunResults

__all__ = ["Source", "source_of"]


@dataclass(frozen=True)
class Source:
    """A run, as far as it is drawn.

    Args:
        phase: What it is in.
        names: Of the candidates.
        blocks: Names of the coefficient blocks.
        weights: ``(n, B)`` the averaging weights; ``None`` before the phase.
        result: What the phase was worth; ``None`` before its end, and without one.
    """

    phase: str
    names: list[str]
    blocks: list[str]
    weights: Tensor | None
    result: Result | None

    def compared(self) -> Result:
        """The result, with losses on held-out data.

        Raises:
            ValueError: When nothing was compared, why, and what to do.
        """
        result = self.result
        if result is not None and result.heldout is not None:
            return result
        if result is not None:
            why = result.reason
        elif self.phase != "done":
            why = "the phase has not ended yet"
        else:
            why = "the run had no such data, or no phase"
        raise ValueError(
            f"There are no losses on held-out data to draw ({why}). After the end of a run whose "
            f"fit() got validation data, and with heldout='auto', there are."
        )

    def averages(self, most: int) -> dict[str, Tensor]:
        """The averaging weights, ``(n,)`` float64, of fixed averages that were compared: of the
        chosen one, of the uniform one, and of the best others.

        Args:
            most: How many.
        """
        if self.result is None or self.result.start is None:
            return {}
        losses, held = self.result.losses, self.result.averages
        best = sorted(losses, key=lambda n: losses[n] if losses[n] == losses[n] else float("inf"))
        order = dict.fromkeys([self.result.start, "uniform", *best])
        found = [name for name in order if name in held][:most]
        return {n: torch.tensor(held[n], dtype=torch.float64, device="cpu") for n in found}

    def label(self, average: str) -> str:
        """What a legend calls a fixed average."""
        chosen = self.result is not None and average == self.result.start
        return f"{average}, chosen" if chosen else average


def source_of(source: RunResults | str | os.PathLike[str]) -> Source:
    """Of a callback, or of a checkpoint, of which no Python objects are loaded.

    Raises:
        ValueError: When the file is no checkpoint of such a run.
    """
    if isinstance(source, RunResults):
        return Source(
            source.phase,
            source.candidate_names,
            source.block_names,
            source.averaging_weights,
            source.result,
        )
    state = read_state(source)
    result = Result.from_state(state["result"]) if "result" in state else None
    return Source(
        state["phase"],
        state["candidate_names"],
        state.get("block_names", []),
        state.get("averaging_weights"),
        result,
    )
