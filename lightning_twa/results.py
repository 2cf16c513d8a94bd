"""What is read of a run, during and after it, by users, figures, averages and loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from torch import Tensor, nn

from lightning_twa.candidates import Candidate

__all__ = ["RunRecord", "RunResults", "effective_candidates"]


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
    def average_path(self) -> str | None: ...
    def average_state_dict(self, module: nn.Module | None) -> dict[str, Tensor]: ...


class RunResults:
    """What a callback tells of its run."""

    _run: RunRecord

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
        optimizer steps), oldest first; before them ``"ema(0.97)"`` and the names of files.
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
        """The way of the averaging weights through the last phase, ``(points, n, B)`` float32 on
        the CPU, from the uniform average to what was learned; ``None`` before it, and without
        one. Of a long phase, evenly spaced points.
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
