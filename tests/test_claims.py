"""The claims benchmark: its arithmetic, that it goes on where it was, and that its runs are those
that users have.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Any:
    """The benchmark's files as one namespace."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import claims
        import claims_methods
        import claims_runs
        import claims_tables
        import claims_tasks
    finally:
        sys.path.remove(str(BENCHMARKS))
    modules = (claims, claims_methods, claims_runs, claims_tables, claims_tasks)
    return type("Parts", (), {m.__name__.removeprefix("claims_"): m for m in modules})


def result(accuracy: float, nll: float) -> dict[str, float]:
    return {"accuracy": accuracy, "nll": nll, "epochs": 35, "seconds": 1.0}


def test_differences_are_paired(parts) -> None:
    accuracies = {"a": [80.0, 90.0, 70.0], "b": [79.0, 87.0, 69.5]}
    nlls = {"a": [0.5, 0.2, 0.7], "b": [0.6, 0.4, 0.6]}
    seeds = [{name: result(accuracies[name][i], nlls[name][i]) for name in "ab"} for i in range(3)]
    mean, error = parts.tables.difference(seeds, "a", "b", "accuracy")
    assert mean == pytest.approx(1.5)
    assert error == pytest.approx(statistics.stdev([1.0, 3.0, 0.5]) / math.sqrt(3))
    mean, error = parts.tables.difference(seeds, "a", "b", "nll")
    assert mean == pytest.approx((0.1 + 0.2 - 0.1) / 3)  # a lower NLL is better
    assert parts.tables.difference(seeds[:1], "a", "b", "nll")[1] == math.inf


@pytest.mark.parametrize(
    ("gaps", "word"),
    [([1.0, 2.0, 1.5], "better"), ([-1.0, -2.0, -1.5], "worse"), ([1.0, -1.2, 0.1], "equal")],
)
def test_the_verdict_goes_by_the_standard_error(parts, gaps, word) -> None:
    seeds = [
        {"TWA-t": result(80 + gap, 0.5), "good": result(80, 0.5), "bad": result(70, 0.5)}
        for gap in gaps
    ]
    found, sentence = parts.tables.verdict(seeds, "TWA-t", ["bad", "good"], "accuracy")
    assert found == word
    assert "*good*" in sentence
    assert f"{statistics.mean(gaps):+.2f}" in sentence


def test_only_clear_differences_are_bold(parts) -> None:
    assert parts.tables.signed((1.0, 0.4), 2) == "**+1.00 ± 0.40**"
    assert parts.tables.signed((-1.0, 0.6), 2) == "-1.00 ± 0.60"


def test_the_phase_of_the_benchmark_is_that_of_an_ordinary_run(parts, tmp_path) -> None:
    from lightning_twa import TWACallback

    start, task = 4, parts.tasks.TASKS["digits-cnn"]
    runs = parts.methods.Runs(task, 3, tmp_path, start, {start})
    module = runs.twa(start)
    twa, other = TWACallback(start), tmp_path / "ordinary"
    other.mkdir()
    ordinary = task.module(3)
    ends = parts.runs.Recorder(other, ())
    parts.tasks.fit(ordinary, task.data(3), start + parts.methods.PHASE, [twa, ends])
    for epoch in range(start):
        mine, theirs = (
            torch.load(d / f"epoch={epoch}.pt", weights_only=True) for d in (tmp_path, other)
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for (name, mine), theirs in zip(module.named_parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_the_benchmark_s_running_averages_are_those_of_a_loop(parts, tmp_path) -> None:
    task = parts.tasks.TASKS["digits-mlp-noisy"]
    every: list[torch.Tensor] = []

    class Watch(parts.runs.Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            every.append(pl_module.net[1].weight.detach().double().clone())

    parts.tasks.fit(task.module(0), task.data(0), 2, [Watch(tmp_path, ())])
    for decay in parts.runs.EMA_DECAYS:
        powers = [decay ** (len(every) - 1 - i) for i in range(len(every))]
        expected = sum(p * w for p, w in zip(powers, every, strict=True)) / sum(powers)
        found = torch.load(tmp_path / f"ema={decay}-epoch=1.pt", weights_only=True)["net.1.weight"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small(parts, monkeypatch) -> Any:
    """One task of few epochs."""
    task = dataclasses.replace(parts.tasks.TASKS["digits-mlp-noisy"], epochs=8)
    monkeypatch.setitem(parts.methods.TASKS, "digits-mlp-noisy", task)
    for module in (parts.methods, parts.runs):
        monkeypatch.setattr(module, "START", 4)
    monkeypatch.setattr(parts.runs, "BANK_START", 2)
    monkeypatch.setattr(parts.methods, "STARTS", (3, 4))
    monkeypatch.setattr(parts.methods, "PHASE", 2)
    monkeypatch.setattr(parts.methods.Runs.twa, "__defaults__", (4, "train"))
    return parts


def test_a_result_has_every_row_and_a_report(small, tmp_path) -> None:
    rows = small.methods.generalization("digits-mlp-noisy", 0, tmp_path)
    assert {title: r["epochs"] for title, r in rows.items() if "@" not in title} == {
        "TWA-t": 6,
        "TWA-v": 6,
        "TWA-t with running averages": 6,
        "TWA-t, simplex": 6,
        "TWA-t, mask": 6,
        "last iterate": 4,
        "uniform over all": 4,
        "uniform over the last half": 4,
        "last k, k by validation": 4,
        "EMA, best of three by validation": 4,
        "learning-rate drop": 6,
        "full schedule": 8,
    }
    assert all(0 < r["accuracy"] <= 100 for r in rows.values())
    # a mask of one candidate, and the last k, may be the same as another row
    distinct = [t for t in rows if "@" not in t and "mask" not in t and "last k" not in t]
    assert len({(rows[t]["accuracy"], rows[t]["nll"]) for t in distinct}) == len(distinct) == 10
    results = {("generalization", "digits-mlp-noisy", seed): rows for seed in (0, 1)}
    text = small.tables.claims(results)
    for title in rows:
        assert title.split("@")[0] in text
    assert f"{rows['TWA-t']['accuracy']:.2f} ± 0.00" in text


def test_finished_results_are_kept_and_those_of_other_code_are_not(
    small, tmp_path, monkeypatch
) -> None:
    calls: list[int] = []

    def fake(task: str, seed: int, folder: Path) -> Any:
        calls.append(seed)
        return {"a": result(1.0 + seed, 1.0)}

    class InProcess:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __enter__(self) -> InProcess:
            return self

        def __exit__(self, *args: Any) -> None: ...

        def submit(self, function: Any, *args: Any) -> Any:
            from concurrent.futures import Future

            future: Future = Future()
            future.set_result(function(*args))
            return future

    monkeypatch.setattr(small.methods, "soups", fake)
    monkeypatch.setattr(small.claims, "ProcessPoolExecutor", InProcess)
    jobs = [("soups", "language-soup", seed) for seed in range(3)]
    threads = torch.get_num_threads()
    first = small.claims.run(jobs, tmp_path, 2)
    assert sorted(calls) == [0, 1, 2]
    assert first["soups", "language-soup", 2] == {"a": result(3.0, 1.0)}
    (tmp_path / "soups-language-soup-1.json").write_text('{"code": "')  # cut off
    stale = json.loads((tmp_path / "soups-language-soup-2.json").read_text())
    (tmp_path / "soups-language-soup-2.json").write_text(json.dumps({**stale, "code": "other"}))
    assert small.claims.run(jobs, tmp_path, 2) == first
    assert sorted(calls[3:]) == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))
    torch.set_num_threads(threads)
