"""Averages with weights that are not learned: the baselines of TWA, on files or candidates."""

from lightning_twa.average.fixed import METHODS, average, factors
from lightning_twa.average.greedy import mode_of

__all__ = ["METHODS", "average", "factors", "mode_of"]
