"""Markdown tables and sentences from the results of the claims benchmark.

Differences are paired over the seeds that have both rows; positive is better for both metrics.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from claims_groups import COSINE, DROP, LONG_DROP, PAPER, TWA, WHOLE
from claims_runs import LAST
from claims_tasks import Task

Rows = Mapping[str, Mapping[str, Any]]
Results = Mapping[tuple[str, int, str], Mapping[str, Any]]  # by task, seed and group

PICKED = "best fixed, picked by validation"
ORACLE = "best fixed, picked after the fact for each seed"
METRICS = {"nll": ("NLL", "nats", -1, 4), "accuracy": ("accuracy", "points", 1, 2)}
CHOSEN_BY = "val_nll"  # the held-out quantity that everything is chosen by
BOLD = "Bold: more than two standard errors."

# --- numbers


def seeds_of(results: Results, task: str) -> list[Rows]:
    """The rows of each seed, with the fixed averages that somebody would have picked."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for (name, seed, _), group in results.items():
        if name == task:
            found.setdefault(seed, {}).update(group["rows"])
    for rows in found.values():
        averages = [row for row in rows.values() if row["kind"] == "fixed"]
        if averages:
            rows[PICKED] = {**min(averages, key=lambda row: row["val_nll"]), "kind": "picked"}
            rows[ORACLE] = {**min(averages, key=lambda row: row["nll"]), "kind": "picked"}
    return list(found.values())


def notes_of(results: Results, task: str, group: str) -> list[Mapping[str, Any]]:
    """What the runs of a group said, of each seed."""
    return [r["notes"] for (name, _, g), r in results.items() if (name, g) == (task, group)]


def values(seeds: Sequence[Rows], title: str, metric: str) -> list[float]:
    """Of one row in all seeds that have it."""
    return [rows[title][metric] for rows in seeds if title in rows]


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean; infinite for one number."""
    if len(numbers) < 2:
        return math.inf
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def difference(seeds: Sequence[Rows], a: str, b: str, metric: str) -> tuple[float, float]:
    """How much better ``a`` is than ``b`` in the same seed: mean and standard error; NaN where no
    seed has both.
    """
    sign = _sign(metric)
    both = [rows for rows in seeds if a in rows and b in rows]
    gaps = [sign * (rows[a][metric] - rows[b][metric]) for rows in both]
    return (statistics.mean(gaps), standard_error(gaps)) if gaps else (math.nan, math.nan)


def best_fixed(seeds: Sequence[Rows], metric: str) -> str | None:
    """The fixed average that is best in the mean: picked after the fact, in its favour."""
    sign = _sign(metric)
    titles = [title for title, row in seeds[0].items() if row["kind"] == "fixed"] if seeds else []
    means = {title: sign * statistics.mean(values(seeds, title, metric)) for title in titles}
    return max(means, key=lambda title: means[title], default=None)


def _sign(metric: str) -> int:
    return -1 if metric == CHOSEN_BY else METRICS[metric][2]


def verdict(gap: tuple[float, float]) -> str:
    """``"better"``, ``"equal"`` or ``"worse"``, by one standard error."""
    mean, error = gap
    if not math.isfinite(error):
        return "unknown"
    return "equal" if abs(mean) <= error else "better" if mean > 0 else "worse"


# --- text


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def signed(gap: tuple[float, float], digits: int) -> str:
    """A mean and its standard error, bold where it is more than two of them from zero."""
    mean, error = gap
    if not math.isfinite(mean):
        return ""
    if not math.isfinite(error):
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def compared(seeds: Sequence[Rows], against: str, steps: bool = True) -> str:
    """One line a row: scores, and how much better ``against`` is."""
    titles = list(dict.fromkeys(title for rows in seeds for title in rows))
    order = {"learned": 0, "picked": 1, "fixed": 2, "soup": 2}
    row_of = {title: next(rows[title] for rows in seeds if title in rows) for title in titles}
    titles.sort(key=lambda title: order.get(row_of[title]["kind"], 3))
    lines = []
    for title in titles:
        shown = [f"{row_of[title]['steps']}"] if steps else []
        shown.append(str(len(values(seeds, title, "nll"))))
        for metric, (_, _, _, digits) in METRICS.items():
            gap = (
                ""
                if title == against
                else signed(difference(seeds, against, title, metric), digits)
            )
            shown += [spread(values(seeds, title, metric), digits), gap]
        lines.append([title, *shown])
    header = ["weights", *(["steps"] if steps else []), "seeds"]
    for name, unit, *_ in METRICS.values():
        label = f"{name} (%)" if unit == "points" else name
        header += [label, f"{against} better, {unit}"]
    return table(header, lines)


# --- the report


def claims(results: Results, tasks: Mapping[str, Task]) -> str:
    """The whole report."""
    there = [task for name, task in tasks.items() if any(name == key[0] for key in results)]
    parts = [
        _summary(results, [t for t in there if t.kind == "main"], "At equal optimizer steps"),
        _summary(results, [t for t in there if t.kind == "noise"], "Label noise"),
        _by_held_out(results, [t for t in there if t.kind == "noise"]),
        _times(results, there),
        _choices(results, there),
    ]
    parts += [_rates(results, base, tasks) for base in dict.fromkeys(map(_base, there)) if base]
    for task in there:
        if task.kind != "rate":
            seeds = seeds_of(results, task.name)
            parts.append(f"### {task.name}\n\n{task.words}.\n\n{compared(seeds, TWA)}")
    for name in dict.fromkeys(key[0] for key in results if key[0] not in tasks):
        text = compared(seeds_of(results, name), "TWA-v", steps=False)
        parts.append(f"### {name}: averages of fine-tuning runs\n\n{text}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(task: Task) -> str:
    return task.name.partition(" x")[0] if task.kind == "rate" else ""


def _by_held_out(results: Results, there: Sequence[Task]) -> str:
    """The same by what it was chosen by."""
    lines = []
    for task in there:
        seeds = [rows for rows in seeds_of(results, task.name) if PICKED in rows and TWA in rows]
        rival = best_fixed(seeds, CHOSEN_BY)
        if rival is not None:
            gaps = [difference(seeds, TWA, r, CHOSEN_BY) for r in (rival, PICKED)]
            lines.append([task.name, str(len(seeds)), rival, *(signed(gap, 4) for gap in gaps)])
    if not lines:
        return ""
    header = ["task", "seeds", "best fixed in the mean", "than that", "than each seed's best"]
    return (
        "By NLL on the held-out data, which is what everything was chosen by, their labels as "
        f"noisy as those of training (but for clean), TWA is better by so many nats. {BOLD}\n\n"
        + table(header, lines)
    )


def _summary(results: Results, there: Sequence[Task], heading: str) -> str:
    """How much better TWA is than what it has to beat, by both metrics."""
    parts = []
    for metric, (name, unit, _, digits) in METRICS.items():
        lines = []
        words: dict[str, list[str]] = {}
        for task in there:
            seeds = seeds_of(results, task.name)
            rival = best_fixed([rows for rows in seeds if ORACLE in rows], metric)
            if rival is None or not values(seeds, TWA, metric):
                continue
            rivals = [rival, ORACLE, PICKED, PAPER, DROP, LONG_DROP, COSINE, WHOLE]
            gaps = [difference(seeds, TWA, r, metric) for r in rivals]
            count = sum(TWA in rows and rival in rows for rows in seeds)
            words.setdefault(verdict(gaps[0]), []).append(task.name)
            lines.append([task.name, str(count), rival, *(signed(gap, digits) for gap in gaps)])
        if not lines:
            continue
        header = [
            "task",
            "seeds",
            "best fixed in the mean (a)",
            "than (a)",
            "than each seed's best",
        ]
        header += ["than the one picked by validation", "than the paper's phase"]
        header += ["than a rate drop as long as the phase", "than one of the paper's length"]
        header += ["than a cosine to 0", "than twice the steps"]
        said = "; ".join(
            f"{word} on {len(names)} ({', '.join(names)})" for word, names in words.items()
        )
        parts.append(
            f"By {name}, TWA with its defaults is better by so many {unit}:\n\n"
            + table(header, lines)
            + f"\n\nBy one standard error against (a): {said}."
        )
    if not parts:
        return ""
    return (
        f"### {heading}\n\nPaired differences to TWA, mean ± standard error; positive is "
        "better. (a) is picked after the fact by its mean on the test data, each seed's best by "
        f"that seed's test NLL: nobody could have known them. {BOLD}\n\n" + "\n\n".join(parts)
    )


def _times(results: Results, there: Sequence[Task]) -> str:
    lines = []
    for task in there:
        runs = notes_of(results, task.name, "twa")
        phases = notes_of(results, task.name, "fixed")
        if task.kind != "main" or not runs or not phases:
            continue
        shares = [
            [100 * run[key] / run["seconds"] for run in runs]
            for key in ("phase_seconds", "measuring_seconds")
        ]
        plain = [n["ordinary_seconds"] for n in notes_of(results, task.name, "cosine")]
        seconds = statistics.median(run["seconds"] for run in runs)
        against = f"{seconds / statistics.median(plain):.3f}" if plain else ""
        percents = [f"{statistics.median(share):.2f}" for share in shares]
        steps, length = task.total, phases[0]["phase"]
        percents = [f"{100 * length / steps:.2f}", *percents]
        cells = [str(steps), str(length), f"{seconds:.1f}", *percents, against]
        lines.append([task.name, *cells])
    if not lines:
        return ""
    header = ["task", "steps", "of the phase", "run, s", "steps of the phase (%)"]
    header += ["phase, measuring included (%)", "measuring (%)", "run / ordinary run"]
    return (
        "### Time\n\nWhat the phase, in which averages are measured on held-out data, takes of the "
        "run with TWA, medians over seeds; the goal is at most 2 % on fashion and stream.\n\n"
        + table(header, lines)
    )


def _choices(results: Results, there: Sequence[Task]) -> str:
    lines = []
    for task in there:
        runs = notes_of(results, task.name, "twa")
        if runs and task.kind != "rate":
            counts = [Counter(run[key] for run in runs) for key in ("start", "accepted")]
            lines.append(
                [task.name, *(", ".join(f"{k} ({n})" for k, n in c.most_common()) for c in counts)]
            )
    header = ["task", "start (seeds)", "accepted (seeds)"]
    return "### What held-out data chose\n\n" + table(header, lines) if lines else ""


def _rates(results: Results, base: str, tasks: Mapping[str, Task]) -> str:
    """How much the learning rate matters; the task itself is the factor 1."""
    factors = {1.0: base}
    factors |= {float(name.partition(" x")[2]): name for name in tasks if f"{base} x" in name}
    lines = []
    counts: list[int] = []
    for title in (LAST, "uniform, all steps", "uniform, last half", PICKED, TWA):
        found = [values(seeds_of(results, factors[f]), title, "accuracy") for f in sorted(factors)]
        if not all(found):
            continue
        counts += [len(numbers) for numbers in found]
        means = [statistics.mean(numbers) for numbers in found]
        lines.append([title, *(f"{m:.2f}" for m in means), f"{max(means) - min(means):.2f}"])
    if not lines:
        return ""
    header = ["accuracy (%), mean", *(f"x {f}" for f in sorted(factors)), "largest - smallest"]
    return f"### {base}: the learning rate, at least {min(counts)} seed(s)\n\n" + table(
        header, lines
    )


def study(results: Results, tasks: Mapping[str, Task]) -> str:
    """Each setting against the best fixed average of the task, and over the tasks."""
    parts = []
    names = [name for name in dict.fromkeys(key[0] for key in results) if name in tasks]
    for metric, (label, unit, _, digits) in METRICS.items():
        lines: dict[str, list[str]] = {}
        worst: dict[str, list[float]] = {}
        header = [f"better by {label}, {unit}"]
        for name in names:
            seeds = [rows for rows in seeds_of(results, name) if ORACLE in rows]
            rival = best_fixed(seeds, metric)
            if rival is None:
                continue
            header.append(f"{name} (seeds: {len(seeds)}; {rival})")
            learned = [t for rows in seeds for t, row in rows.items() if row["kind"] == "learned"]
            for title in dict.fromkeys([PICKED, *learned]):
                gap = difference(seeds, title, rival, metric)
                row = lines.setdefault(title, [""] * (len(header) - 2))
                row += [""] * (len(header) - 2 - len(row)) + [signed(gap, digits)]
                if math.isfinite(gap[1]) and gap[1] > 0:
                    worst.setdefault(title, []).append(gap[0] / gap[1])
        if not lines:
            continue
        rows = []
        for title, cells in lines.items():
            cells += [""] * (len(header) - 1 - len(cells))
            rows.append([title, *cells, f"{min(worst[title]):+.1f}" if title in worst else ""])
        parts.append(table([*header, "worst, standard errors"], rows))
    if parts:
        parts.insert(
            0,
            "How much better each setting is than the best fixed average in the mean, picked after "
            f"the fact (named in the header), mean ± standard error over seeds. {BOLD}",
        )
    for name in dict.fromkeys(key[0] for key in results if key[0] not in tasks):
        parts.append(f"{name}:")
        parts.append(compared(seeds_of(results, name), "greedy soup by NLL", steps=False))
    return "\n\n".join(parts) + "\n"
