"""Markdown tables and sentences from the results of the claims benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

Rows = Mapping[str, Mapping[str, float]]
Results = Mapping[tuple[str, str, int], Rows]

TWA = "TWA-t"
FULL = "full schedule"
DROP = "learning-rate drop"
FIXED = (  # averages with fixed weights
    "uniform over all",
    "uniform over the last half",
    "last k, k by validation",
    "EMA, best of three by validation",
)
METRICS = {"accuracy": (1, 2), "nll": (-1, 3)}  # sign of what is better, digits


def of_task(results: Results, kind: str, task: str) -> list[Rows]:
    """The rows of each seed."""
    return [rows for (k, t, _), rows in results.items() if (k, t) == (kind, task)]


def tasks_of(results: Results, kind: str) -> list[str]:
    """The tasks that have results."""
    return list(dict.fromkeys(task for k, task, _ in results if k == kind))


def values(seeds: Sequence[Rows], title: str, metric: str) -> list[float]:
    """Of one row in all seeds."""
    return [rows[title][metric] for rows in seeds]


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean; infinite for one number."""
    if len(numbers) < 2:
        return math.inf
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def difference(seeds: Sequence[Rows], a: str, b: str, metric: str) -> tuple[float, float]:
    """How much better ``a`` is than ``b`` in the same seed: mean and standard error; positive is
    better for both metrics.
    """
    sign = METRICS[metric][0]
    pairs = zip(values(seeds, a, metric), values(seeds, b, metric), strict=True)
    gaps = [sign * (x - y) for x, y in pairs]
    return statistics.mean(gaps), standard_error(gaps)


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def signed(gap: tuple[float, float], digits: int) -> str:
    """A mean and its standard error, bold where it is more than two of them from zero."""
    text = f"{gap[0]:+.{digits}f} ± {gap[1]:.{digits}f}"
    return f"**{text}**" if abs(gap[0]) > 2 * gap[1] else text


def best(seeds: Sequence[Rows], titles: Iterable[str], metric: str) -> str:
    """The row that is best in the mean: picked after the fact, in its favour."""
    sign = METRICS[metric][0]
    return max(titles, key=lambda title: sign * statistics.mean(values(seeds, title, metric)))


def verdict(seeds: Sequence[Rows], a: str, titles: Iterable[str], metric: str) -> tuple[str, str]:
    """``"better"``, ``"equal"`` or ``"worse"`` by more than a standard error than the best of other
    rows, and a sentence.
    """
    rival = best(seeds, titles, metric)
    gap, error = difference(seeds, a, rival, metric)
    word = "equal" if abs(gap) <= error else "better" if gap > 0 else "worse"
    unit, digits = ("points", 2) if metric == "accuracy" else ("nats", 3)
    how = "within one standard error of" if word == "equal" else f"{word} than"
    name = "accuracy" if metric == "accuracy" else "NLL"
    return word, (
        f"By {name} {a} is {how} the best average with fixed weights, *{rival}*: "
        f"{gap:+.{digits}f} ± {error:.{digits}f} {unit}."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def compared(
    seeds: Sequence[Rows], titles: Iterable[str], against: str, seconds: bool = True
) -> str:
    """One line a row: scores, and how much better ``against`` is."""
    lines = []
    for title in titles:
        gaps = [
            "" if title == against else signed(difference(seeds, against, title, m), METRICS[m][1])
            for m in METRICS
        ]
        scores = [spread(values(seeds, title, m), METRICS[m][1]) for m in METRICS]
        time = f"{statistics.median(values(seeds, title, 'seconds')):.1f}"
        epochs = f"{seeds[0][title]['epochs']:.0f}"
        lines.append([title, *([epochs, time] if seconds else []), *scores, *gaps])
    names = [f"{against}: points better", f"{against}: NLL better"]
    header = ["weights", *(["epochs", "s"] if seconds else []), "accuracy (%)", "NLL", *names]
    return table(header, lines)


def claims(results: Results) -> str:
    """The whole report."""
    parts = [_summary(results)]
    for task in tasks_of(results, "generalization"):
        parts.append(_generalization(task, of_task(results, "generalization", task)))
    for task in tasks_of(results, "rates"):
        parts.append(_rates(task, of_task(results, "rates", task)))
    for task in tasks_of(results, "generalization"):
        parts.append(_budgets(task, of_task(results, "generalization", task)))
    for task in tasks_of(results, "soups"):
        parts.append(_soups(task, of_task(results, "soups", task)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(results: Results) -> str:
    tasks = tasks_of(results, "generalization")
    lines = []
    for task in tasks:
        seeds = of_task(results, "generalization", task)
        cells = [task]
        for metric, (_, digits) in METRICS.items():
            rival = best(seeds, FIXED, metric)
            cells += [
                rival,
                signed(difference(seeds, TWA, rival, metric), digits),
                signed(difference(seeds, "TWA-v", rival, metric), digits),
            ]
        lines.append(cells)
    if not lines:
        return ""
    header = ["task", "best fixed weights, accuracy", "TWA-t, points", "TWA-v, points"]
    header += ["best fixed weights, NLL", "TWA-t, NLL", "TWA-v, NLL"]
    return (
        "### In short\n\nPaired differences to the best average with fixed weights of each task, "
        "mean ± standard error; positive is better. The best is picked after the fact by its mean, "
        "in its favour. Bold: more than two standard errors.\n\n"
        + table(header, lines)
        + "\n\n"
        + _same_epochs(results, tasks)
    )


def _same_epochs(results: Results, tasks: Sequence[str]) -> str:
    """TWA-t against what needs no phase and trains on meanwhile."""
    lines = []
    for task in tasks:
        seeds = of_task(results, "generalization", task)
        end = f"@{seeds[0][TWA]['epochs']:.0f}"
        fixed = [title for title in seeds[0] if title.endswith(end) and title[: -len(end)] in FIXED]
        cells = [task]
        for metric, (_, digits) in METRICS.items():
            for rivals in (fixed, [DROP]):
                rival = best(seeds, rivals, metric)
                cells.append(signed(difference(seeds, TWA, rival, metric), digits))
        lines.append(cells)
    header = ["task", "averages, points", "drop, points", "averages, NLL", "drop, NLL"]
    return (
        "The averages above are of 30 epochs, and TWA takes 5 more. At the same number of epochs, "
        "35, TWA-t against the better of the average of the last half and the EMA, and against the "
        "learning-rate drop; positive is better:\n\n" + table(header, lines)
    )


def _generalization(task: str, seeds: Sequence[Rows]) -> str:
    titles = [title for title in seeds[0] if "@" not in title]
    sentences = [verdict(seeds, TWA, FIXED, metric)[1] for metric in METRICS]
    return (
        f"### {task}: candidates of 30 epochs, {len(seeds)} seeds\n\n"
        + compared(seeds, titles, TWA)
        + "\n\n"
        + " ".join(sentences)
    )


def _columns(seeds: Sequence[Rows]) -> tuple[list[str], list[str]]:
    """Methods and what they were varied by, of titles ``method@value``."""
    pairs = [title.split("@") for title in seeds[0] if "@" in title]
    return list(dict.fromkeys(m for m, _ in pairs)), list(dict.fromkeys(v for _, v in pairs))


def _rates(task: str, seeds: Sequence[Rows]) -> str:
    methods, factors = _columns(seeds)
    lines = []
    for method in methods:
        means = [
            statistics.mean(values(seeds, f"{method}@{factor}", "accuracy")) for factor in factors
        ]
        lines.append([method, *(f"{m:.2f}" for m in means), f"{max(means) - min(means):.2f}"])
    header = ["accuracy (%), mean", *(f"x {factor}" for factor in factors), "largest - smallest"]
    return f"### {task}: the learning rate of the collecting run, {len(seeds)} seeds\n\n" + table(
        header, lines
    )


def _budgets(task: str, seeds: Sequence[Rows]) -> str:
    methods, budgets = _columns(seeds)
    texts: list[str] = []
    for metric, (_, digits) in METRICS.items():
        lines = []
        for method in methods:
            gaps = [difference(seeds, f"{method}@{b}", FULL, metric) for b in budgets]
            reached = [b for b, (gap, error) in zip(budgets, gaps, strict=True) if gap >= -error]
            first = reached[0] if reached else "none"
            lines.append([method, *(signed(gap, digits) for gap in gaps), first])
        if metric == "accuracy":
            for title, key in (("TWA-t, s", TWA), ("fixed weights, s", methods[-1])):
                seconds = [
                    statistics.median(values(seeds, f"{key}@{b}", "seconds")) for b in budgets
                ]
                lines.append([title, *(f"{s:.1f}" for s in seconds), ""])
        name = "accuracy, points" if metric == "accuracy" else "NLL"
        header = [f"{name} better than full", *(f"{b} epochs" for b in budgets), "first reached"]
        texts.append(table(header, lines))
    epochs = seeds[0][FULL]["epochs"]
    seconds = statistics.median(values(seeds, FULL, "seconds"))
    return (
        f"### {task}: against the full schedule of {epochs:.0f} epochs ({seconds:.1f} s), "
        f"{len(seeds)} seeds\n\n" + "\n\n".join(texts)
    )


def _soups(task: str, seeds: Sequence[Rows]) -> str:
    return f"### {task}: twelve fine-tuning runs, {len(seeds)} seeds\n\n" + compared(
        seeds, seeds[0], "TWA-v", seconds=False
    )


def study(results: Results) -> str:
    """Each setting against the best average with fixed weights of the task, and over the tasks."""
    tasks = tasks_of(results, "study")
    parts = []
    for metric, (_, digits) in METRICS.items() if tasks else ():
        by_task = {task: of_task(results, "study", task) for task in tasks}
        titles = [t for t in by_task[tasks[0]][0] if t.startswith("TWA")]
        rivals = {task: best(seeds, FIXED, metric) for task, seeds in by_task.items()}

        def gap(task: str, title: str, metric: str = metric, rivals: dict = rivals) -> tuple:  # type: ignore[type-arg]
            return difference(of_task(results, "study", task), title, rivals[task], metric)

        lines = []
        for title in titles:
            gaps = [gap(task, title) for task in tasks]
            worst = min(g / e if e else 0.0 for g, e in gaps)
            lines.append([title, *(signed(g, digits) for g in gaps), f"{worst:+.1f}"])
        name = "accuracy, points" if metric == "accuracy" else "NLL"
        header = [f"{name} better", *tasks, "worst, standard errors"]
        parts.append(table(header, lines))
    for task in tasks_of(results, "soup_study"):
        seeds = of_task(results, "soup_study", task)
        parts.append(f"{task}, {len(seeds)} seeds:")
        parts.append(compared(seeds, seeds[0], "greedy soup by accuracy", seconds=False))
    return "\n\n".join(parts) + "\n"
