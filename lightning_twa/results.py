"""What is read of a run, during and after it, by users, figures, averages and loggers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lightning_twa.candidates import Candidate
from lightning_twa.config import Settings

__all__ = ["Result", "RunRecord", "RunResults", "effective_candidates"]


@dataclass(frozen=True)
class Row:
    """An average in the table of losses on held-out data.

    Args:
        name: What a reader calls it.
        loss: Its mean loss.
        learned: Whether it is a point of the phase's path.
        chosen: Whether it was chosen as the start.
        result: Whether it is the result of the run.
    """

    name: str
    loss: float
    learned: bool = False
    chosen: bool = False
    result: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run's last phase was measured to be worth.

    Args:
        heldout: The data that averages were compared on, in words; ``None`` where nothing was
            compared.
        reason: Why nothing was.
        losses: Mean loss on them of each average that could be taken without learning.
        averages: The averaging weights of each of these, a number for each candidate, in the order
            of :attr:`TWACallback.candidate_names`; empty in checkpoints of before there were any.
        path: The same of points of the phase's path, by its optimizer step.
        start: The one that was chosen, from which free coefficients start: the best, where it is
            better than ``power(0.13)`` (else the uniform one) by more than the standard error of
            the difference over batches, else that one.
        accepted: The optimizer step of the phase whose weights are the result: those of the best
            point of the path, where it is better than ``start`` by more than the standard error.
            ``None`` where ``start`` is the result.
        gain: By how much the result's loss is below that of ``start``, the mean over batches.
        gain_error: Standard error of that mean, of the differences batch by batch; not a number
            with one batch.
        batches: How many were compared on.
        of_batches: How many such batches there are; ``None`` where that is not known.
        steps: Optimizer steps of the phase.
        phase_seconds: That it took, measuring included.
        measuring_seconds: That measuring took.
    """

    heldout: str | None
    reason: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    averages: Mapping[str, list[float]] = field(default_factory=dict)
    path: Mapping[int, float] = field(default_factory=dict)
    start: str | None = None
    accepted: int | None = None
    gain: float = 0.0
    gain_error: float = math.nan
    batches: int = 0
    of_batches: int | None = None
    steps: int = 0
    phase_seconds: float = 0.0
    measuring_seconds: float = 0.0

    def __str__(self) -> str:
        """A table, best first, and the verdict."""
        if self.heldout is None:
            return self.verdict
        rows = self.rows()
        width = max(len(row.name) for row in rows)
        lines = [f"loss on {self.heldout}, {self.extent}:"]
        for row in rows:
            marks = {"chosen": row.chosen, "result": row.result}
            note = ", ".join(mark for mark, is_so in marks.items() if is_so)
            lines.append(f"  {row.name:<{width}}  {row.loss:<9.5g} {note}".rstrip())
        return "\n".join([*lines, self.verdict])

    @property
    def extent(self) -> str:
        """How much was compared on, in words."""
        if self.of_batches is not None and self.of_batches > self.batches:
            return f"{self.batches} of {self.of_batches} batches"
        return "1 batch" if self.batches == 1 else f"{self.batches} batches"

    def rows(self) -> list[Row]:
        """The table: fixed averages, and of the path its end and the result; best first."""
        end = max(self.path, default=None)
        rows = [
            Row(name, loss, chosen=name == self.start, result=self._is_result(name))
            for name, loss in self.losses.items()
        ]
        for step, loss in self.path.items():
            if step in (self.accepted, end):
                name = f"learned, step {step}"
                rows.append(Row(name, loss, learned=True, result=step == self.accepted))
        return sorted(rows, key=lambda row: row.loss if math.isfinite(row.loss) else math.inf)

    def _is_result(self, name: str) -> bool:
        """Whether a fixed average is the result."""
        return self.accepted is None and name == self.start

    @property
    def verdict(self) -> str:
        """What that means, in a sentence."""
        if self.heldout is None:
            return (
                f"Nothing was compared on held-out data ({self.reason}): whether the learned "
                f"average is better than a fixed one is not known."
            )
        if self.accepted is None:
            one = " It is one batch: that may be chance." if self.batches == 1 else ""
            return (
                f"No point of the phase's path was clearly better than the average that was "
                f"chosen, {self.start!r}, which is the result: learning gained nothing here.{one}"
            )
        error = "" if math.isnan(self.gain_error) else f" +- {self.gain_error:.2g}"
        if self.gain < 0:
            return (
                f"The result is the average after step {self.accepted} of {self.steps} of the "
                f"phase, {-self.gain:.2g}{error} above the average that was chosen, "
                f"{self.start!r}, which could not be put together from the candidates."
            )
        chance = "" if self.gain > 2 * self.gain_error else ", which may be chance"
        return (
            f"The result is the average after step {self.accepted} of {self.steps} of the phase: "
            f"{self.gain:.2g}{error} below the average that was chosen, {self.start!r}{chance}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        return {**asdict(self), "path": [[step, loss] for step, loss in self.path.items()]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Result:
        """Of :meth:`state_dict`."""
        return cls(**{**state, "path": {int(step): loss for step, loss in state["path"]}})


class RunRecord(Protocol):
    """Where :class:`RunResults` are read from; see there."""

    @property
    def phase(self) -> Literal["collect", "optimize", "done"]: ...
    @property
    def store(self) -> Iterable[Candidate]: ...
    @property
    def candidate_names(self) -> list[str]: ...
    @property
    def further_names(self) -> Mapping[str, str]: ...
    @property
    def block_names(self) -> list[str]: ...
    @property
    def averaging_weights(self) -> Tensor | None: ...
    @property
    def averaging_path(self) -> Tensor | None: ...
    @property
    def result(self) -> Result | None: ...
    @property
    def average_path(self) -> str | None: ...
    def average_state_dict(self, module: nn.Module | None) -> dict[str, Tensor]: ...


class RunResults:
    """What a callback tells of its run."""

    _run: RunRecord
    settings: Settings

    @property
    def phase(self) -> Literal["collect", "optimize", "done"]:
        """``"collect"``, then ``"optimize"`` from the switch on, then ``"done"``."""
        return self._run.phase

    @property
    def num_candidates(self) -> int:
        """Number of candidates."""
        return len(self.candidate_names)

    @property
    def candidate_names(self) -> list[str]:
        """``"epoch=3"`` (weights at the end of that 0-based epoch) or ``"step=120"`` (after so many
        optimizer steps), with ``CollectConfig(dense=True)`` means until then, oldest first; before
        them ``"ema(0.97)"`` and the names of files.
        """
        return self._run.candidate_names

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates that this process holds, in the order of :attr:`candidate_names`. Each has
        a ``name``, and ``parameters`` and ``buffers`` by name, on the CPU. A checkpoint of a
        finished run holds none, nor does a copy (``deepcopy``, ``pickle``) of a callback that has
        finished.
        """
        return list(self._run.store)

    @property
    def further_names(self) -> dict[str, str]:
        """Every further name that a state dict has for a tied tensor, with the name that candidates
        have it under.
        """
        return dict(self._run.further_names)

    @property
    def block_names(self) -> list[str]:
        """Names of the coefficient blocks; empty before the phase."""
        return list(self._run.block_names)

    @property
    def averaging_weights(self) -> Tensor | None:
        """The learned weights, ``(n, B)`` float64 on the CPU; ``None`` before the phase, of each
        cycle.

        In block ``b`` the model's weights are ``sum_i averaging_weights[i, b] * candidate_i``.
        Columns sum to 1 in the centered bases.
        """
        return self._run.averaging_weights

    @property
    def result(self) -> Result | None:
        """What the last phase was measured to be worth on held-out data: a frozen dataclass, which
        prints as a table; ``None`` before its end and without a phase.
        """
        return self._run.result

    @property
    def average_path(self) -> str | None:
        """The checkpoint that holds the finished average; ``None`` where none was written. Of
        ``cycles`` the newest.
        """
        return self._run.average_path

    def average_state_dict(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Parameters and buffers of the finished average, BatchNorm statistics included, also when
        the model holds other weights by now.

        Args:
            module: Whose names they are to have, where they differ by what ``torch.compile`` or
                data parallelism put into them; ``None``: those of the module that was trained.

        Returns:
            Copies on the CPU by name, of a sharded model this process's part.

        Raises:
            ValueError: When there is no finished average, or naming the tensor that it lacks.
        """
        return self._run.average_state_dict(module)

    @property
    def averaging_path(self) -> Tensor | None:
        """The path of the averaging weights through the last phase, ``(points, n, B)`` float32 on
        the CPU, from the center to what was learned; ``None`` before it, and without one. Of a long
        phase, evenly spaced points.
        """
        return self._run.averaging_path


def effective_candidates(averaging_weights: Tensor) -> float:
    """How many equally weighted candidates the weights amount to, ``(sum |beta|)^2 / sum beta^2``.

    ``n`` for the uniform average, 1 for a single candidate.

    Args:
        averaging_weights: ``(n, B)``; the mean over the blocks is taken.
    """
    total = averaging_weights.abs().sum(dim=0).square()
    return float((total / averaging_weights.square().sum(dim=0)).mean())
