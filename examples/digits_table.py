"""The table of ``digits.py``, and where TWA does not win."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from scipy.stats import t as student_t


class Score(NamedTuple):
    """Of one model on the test images."""

    accuracy: float  # percent
    nll: float


class Row(NamedTuple):
    """One line of the table."""

    kind: str  # "fixed" averaging weights, "twa", or "trained"
    epochs: int
    scores: list[Score]  # one per seed


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | epochs | test accuracy (%) | test NLL |",
        "|---|---:|---:|---:|",
    ]
    for name, row in rows.items():
        accuracy = [score.accuracy for score in row.scores]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else math.nan
        nll = statistics.mean(score.nll for score in row.scores)
        mean = statistics.mean(accuracy)
        lines.append(f"| {name} | {row.epochs} | {mean:.2f} ± {spread:.2f} | {nll:.3f} |")
    return "\n".join(lines)


class Difference(NamedTuple):
    """Mean and standard error of paired differences, positive where the first row is better."""

    mean: float
    error: float
    seeds: int

    @property
    def outcome(self) -> str:
        """In words, by a two-sided t-test at 5 %; with one seed nothing is clear."""
        threshold = student_t.ppf(0.975, self.seeds - 1) * self.error
        if self.mean > threshold:
            return "better"
        return "worse" if self.mean < -threshold else "no clear difference"


def difference(row: Row, other: Row, metric: str) -> Difference:
    """How much better ``row`` is, seed by seed: in points of accuracy, or in NLL."""
    values = [
        getattr(a, metric) - getattr(b, metric)
        for a, b in zip(row.scores, other.scores, strict=True)
    ]
    if metric == "nll":  # lower is better
        values = [0 - value for value in values]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Difference(statistics.mean(values), error, len(values))


def verdict(rows: dict[str, Row]) -> str:
    """Where TWA does not win: every TWA row against the best fixed average and all baselines."""
    fixed = {name: row for name, row in rows.items() if row.kind == "fixed"}
    baselines = {name: row for name, row in rows.items() if row.kind != "twa"}
    seeds = len(next(iter(rows.values())).scores)
    lines = [
        f"Mean paired differences ± standard error over {seeds} seed{'s' * (seeds > 1)}, positive "
        f"where TWA is better."
        + (" Clear is what a t-test at 5 % tells from zero." if seeds > 1 else "")
    ]
    for metric, title, form in (("accuracy", "Accuracy in points", ".2f"), ("nll", "NLL", ".3f")):
        reference = next(iter(fixed.values()))
        best = max(fixed, key=lambda n: difference(fixed[n], reference, metric).mean)
        lines.append(f"\n{title}, against the best fixed average, {best}:")
        for name, row in rows.items():
            if row.kind != "twa":
                continue
            delta = difference(row, fixed[best], metric)
            not_beaten = ""
            for outcome, label in (
                ("no clear difference", "No clear difference from"),
                ("worse", "Clearly worse than"),
            ):
                others = [
                    other
                    for other, baseline in baselines.items()
                    if difference(row, baseline, metric).outcome == outcome
                ]
                if others:
                    not_beaten += f" {label}: {'; '.join(others)}."
            lines.append(
                f"- {name}: {delta.mean:+{form}} ± {delta.error:{form}}, {delta.outcome}."
                + (not_beaten or " Clearly better than all.")
            )
    return "\n".join(lines)
