"""Averages with weights that are not learned: the baselines of TWA, on files or candidates."""

from lightning_twa.average.fixed import METHODS, average

__all__ = ["METHODS", "average"]
