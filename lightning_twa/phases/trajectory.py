"""The way that the averaging weights take through the phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Trajectory"]

MAX_POINTS = 200
MAX_BYTES = 1 << 20  # in a checkpoint


class Trajectory:
    """Records averaging weights, evenly spaced and few enough for a checkpoint.

    When there are too many points, every second is dropped and half as many are taken from there
    on.

    Attributes:
        waits: For the end of a step that has begun.
    """

    def __init__(self) -> None:
        self.waits = False
        self._points: list[Tensor] = []
        self._stride = 1
        self._steps = 0

    @property
    def points(self) -> Tensor | None:
        """``(points, n, B)`` float32 on the CPU, from the first weights on; ``None`` before."""
        self._points = [point.cpu() for point in self._points]
        return torch.stack(self._points) if self._points else None

    def due(self) -> bool:
        """Count a step; whether its weights are to be recorded."""
        self.waits = False
        self._steps += 1
        return self._steps % self._stride == 0

    def record(self, weights: Tensor) -> None:
        """Add a point.

        Args:
            weights: ``(n, B)``; kept where they are until somebody reads :attr:`points`.
        """
        self._points.append(weights.to(torch.float32))
        limit = max(3, min(MAX_POINTS, MAX_BYTES // (4 * weights.numel())))
        if len(self._points) > limit:
            self._points = self._points[::2]
            self._stride *= 2

    def clear(self) -> None:
        """Forget it."""
        self._points, self._stride, self._steps = [], 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with."""
        return {"points": self.points, "stride": self._stride, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        points = state["points"]
        self._points = [] if points is None else list(points)
        self._stride, self._steps = state["stride"], state["steps"]
