"""The claims benchmark: its fixed averages are those of a loop, its learning-rate drops go on from
the run, its differences are paired, and it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import statistics
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from lightning_twa import TWACallback

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Any:
    """The benchmark's files as one namespace."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import claims
        import claims_data
        import claims_groups
        import claims_larger
        import claims_runs
        import claims_soups
        import claims_tables
        import claims_tasks
    finally:
        sys.path.remove(str(BENCHMARKS))
    modules = (claims, claims_data, claims_groups, claims_larger, claims_runs, claims_soups)
    modules = (*modules, claims_tables, claims_tasks)
    return type("Parts", (), {m.__name__.removeprefix("claims_"): m for m in modules})


@pytest.fixture(scope="module")
def small(parts) -> Any:
    """A task of 6 of 12 epochs with BatchNorm."""
    task = parts.tasks.tasks(parts.tasks.Options())["digits-cnn"]
    return dataclasses.replace(task, epochs=12, run=6)


# --- fixed averages


def test_profiles_are_those_of_the_recursions(parts) -> None:
    steps = 37
    walk = torch.randn(steps, 5, dtype=torch.float64).cumsum(0)
    found = parts.runs.profiles(steps, 3)
    for title, profile in found.items():
        assert profile.shape == (steps,), title
        assert profile.sum().item() == pytest.approx(1), title
    for sigma in parts.runs.SIGMAS:
        gamma, a = parts.runs.exponent(sigma), torch.zeros(5, dtype=torch.float64)
        width = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
        assert width == pytest.approx(sigma)
        for t, w in enumerate(walk, 1):
            a = a + (1 - (1 - 1 / t) ** (gamma + 1)) * (w - a)
        torch.testing.assert_close(found[f"power average {sigma}"] @ walk, a)
    for decay in parts.runs.EMA_DECAYS:
        a = torch.zeros(5, dtype=torch.float64)
        for w in walk:
            a = decay * a + (1 - decay) * w
        torch.testing.assert_close(found[f"EMA {decay}"] @ walk, a / (1 - decay**steps))
    torch.testing.assert_close(
        found["last 4 snapshots"] @ walk, walk[[26, 29, 32, 35]].mean(0)
    )  # after steps 27, 30, 33 and 36
    torch.testing.assert_close(found["uniform, last half"] @ walk, walk[-18:].mean(0))


def test_the_decay_curve_scales_each_update(parts) -> None:
    steps, count = 20, 8
    walk = torch.randn(steps, 3, dtype=torch.float64).cumsum(0)
    expected = walk[steps - count - 1]
    for i in range(count):
        update = walk[steps - count + i] - walk[steps - count + i - 1]
        expected = expected + (1 - math.sqrt((i + 0.5) / count)) * update
    torch.testing.assert_close(parts.runs.decay_curve(steps, count) @ walk, expected)


def test_one_run_gives_every_fixed_average(parts, small) -> None:
    every: list[torch.Tensor] = []

    class Watch(parts.runs.Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            every.append(parameters_to_vector(pl_module.parameters()).detach().double())

    found = parts.runs.profiles(small.total, small.interval)
    recorder, data = Watch(found), small.data(1)
    parts.tasks.fit(small.module(1), data, small.epochs, [recorder])
    walk = torch.stack(every[: small.total])
    assert len(every) == 2 * small.total
    averaged = small.module(1)
    for title, profile in found.items():
        recorder.put(title, averaged, data)
        weights = parameters_to_vector(averaged.parameters()).detach()
        torch.testing.assert_close(weights.double(), profile @ walk, rtol=1e-4, atol=1e-5)
        batches = averaged.net[1].num_batches_tracked.item()
        assert batches == (small.total if title == parts.runs.LAST else small.steps)


def test_a_drop_goes_on_from_the_run_on_the_same_batches(parts, small) -> None:
    start = small.total - 11
    kept, fallen = (parts.runs.Drop(small.module(2), start, 11, falling) for falling in (0, 1))
    module = small.module(2)
    parts.tasks.fit(module, small.data(2), small.run, [kept, fallen])
    for mine, theirs in zip(kept.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert fallen.rates == [0.1]
    assert fallen.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 11)
    assert not torch.equal(fallen.module.net[0].weight, module.net[0].weight)


# --- data


def test_a_drop_is_as_long_as_the_phase(parts) -> None:
    expected = {20: 1, 180: 6, 240: 8, 480: 16, 1500: 32, 2000: 32, 100_000: 1000}
    assert {steps: parts.runs.default_phase(steps) for steps in expected} == expected


def test_labels_are_drawn_anew_for_training_and_validation(parts) -> None:
    options = parts.tasks.Options()
    clean, noisy, right = (
        parts.tasks.tasks(options)[f"noise-{name}"].data(0) for name in ("0", "40", "40-clean")
    )
    share = (clean.val.tensors[1] != noisy.val.tensors[1]).float().mean().item()
    assert share == pytest.approx(0.36, abs=0.12)  # a tenth of the drawn labels is right
    assert torch.equal(clean.val.tensors[1], right.val.tensors[1])
    assert torch.equal(clean.test.tensors[1], noisy.test.tensors[1])
    assert torch.equal(clean.test.tensors[0], noisy.test.tensors[0])


def test_a_stream_is_read_once_and_held_out_files_are_others(parts, tmp_path, monkeypatch) -> None:
    files = []
    for i in range(60):  # two bytes of its own in random order
        files.append(tmp_path / f"{i:02}.py")
        text = 64 + 2 * i + torch.randint(2, (8000,), generator=torch.Generator().manual_seed(i))
        files[-1].write_bytes(bytes(text.tolist()))
    files.append(tmp_path / "copy.py")
    files[-1].write_bytes(files[0].read_bytes())
    monkeypatch.setattr(parts.larger, "source_files", lambda: files)
    data = parts.larger.stream(3, batch_size=4, steps=30)
    windows = [x for batch in data.train.batches(0) for x in batch[0]]
    assert len({tuple(window.tolist()) for window in windows}) == len(windows) == 4 * 30
    parts_seen = [torch.stack(windows), data.val.tensors[0], data.test.tensors[0]]
    seen = [set(part.flatten().tolist()) - {10} for part in parts_seen]  # 10 is between files
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    inputs, labels = data.val.tensors
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    with pytest.raises(ValueError, match="too little text for 3000 steps"):
        parts.larger.stream(3, batch_size=4, steps=3000)


def test_fashion_is_read_from_its_usual_files(parts, tmp_path) -> None:
    pixels = torch.randint(256, (30, 28, 28), dtype=torch.uint8)
    labels = (torch.arange(30) % 10).to(torch.uint8)
    assert len(parts.larger.missing(tmp_path)) == 4
    for images_name, labels_name in parts.larger.FILES.values():
        content = bytes(16) + pixels.numpy().tobytes()
        (tmp_path / images_name).write_bytes(gzip.compress(content))
        (tmp_path / labels_name).write_bytes(gzip.compress(bytes(8) + labels.numpy().tobytes()))
    assert parts.larger.missing(tmp_path) == []
    data = parts.larger.fashion(str(tmp_path), 0, (20, 5))
    x, y = data.test.tensors
    assert torch.equal(x, pixels.unsqueeze(1).float() / 255)
    assert torch.equal(y, labels.long())
    (batch, _), *_ = data.train.batches(0)
    assert batch.shape == (20, 1, 28, 28)
    assert parts.larger.residual_net(4)(batch).shape == (20, 10)


# --- tables


def row(nll: float, kind: str = "fixed", val_nll: float = 0.0) -> dict[str, Any]:
    return {"nll": nll, "accuracy": 100 - nll, "val_nll": val_nll, "kind": kind, "steps": 9}


def results_of(seeds: list[dict[str, Any]]) -> Any:
    return {("t", i, "fixed"): {"rows": rows, "notes": {}} for i, rows in enumerate(seeds)}


def test_differences_are_paired_over_the_seeds_that_have_both(parts) -> None:
    gaps = [1.0, 3.0, 0.5]
    seeds = [{"a": row(5.0 * i), "b": row(5.0 * i + gap)} for i, gap in enumerate(gaps)]
    mean, error = parts.tables.difference([*seeds, {"a": row(100.0)}], "a", "b", "nll")
    assert mean == pytest.approx(1.5)
    assert error == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    assert parts.tables.difference(seeds, "a", "b", "accuracy")[0] == pytest.approx(1.5)
    assert parts.tables.difference(seeds[:1], "a", "b", "nll")[1] == math.inf
    assert math.isnan(parts.tables.difference(seeds, "a", "c", "nll")[0])


@pytest.mark.parametrize(
    ("gap", "word"),
    [
        ((1.0, 0.9), "better"),
        ((-1.0, 0.9), "worse"),
        ((-1.0, 1.1), "equal"),
        ((1.0, math.inf), "unknown"),
    ],
)
def test_the_verdict_goes_by_the_standard_error(parts, gap, word) -> None:
    assert parts.tables.verdict(gap) == word


def test_only_clear_differences_are_bold(parts) -> None:
    assert parts.tables.signed((1.0, 0.4), 2) == "**+1.00 ± 0.40**"
    assert parts.tables.signed((-1.0, 0.6), 2) == "-1.00 ± 0.60"
    assert parts.tables.signed((-1.0, math.inf), 2) == "-1.00"
    assert parts.tables.signed((math.nan, math.nan), 2) == ""


def test_fixed_averages_are_picked_by_validation_and_after_the_fact(parts) -> None:
    seeds = parts.tables.seeds_of(
        results_of(
            [
                {"a": row(1.0, val_nll=2.0), "b": row(2.0, val_nll=1.0), "d": row(0.5, "drop")},
                {"a": row(5.0, val_nll=3.0), "b": row(3.0, val_nll=4.0), "d": row(0.5, "drop")},
            ]
        ),
        "t",
    )
    assert [rows[parts.tables.PICKED]["nll"] for rows in seeds] == [2.0, 5.0]
    assert [rows[parts.tables.ORACLE]["nll"] for rows in seeds] == [1.0, 3.0]
    assert parts.tables.best_fixed(seeds, "nll") == "b"


# --- runs


def test_every_group_has_its_rows_and_the_report_has_them(parts, small) -> None:
    results: dict[Any, Any] = {}
    task = dataclasses.replace(small, name="digits-cnn")
    for name, group in parts.groups.GROUPS.items():
        results["digits-cnn", 0, name] = json.loads(json.dumps(group(task, 0)))
    rows = {title: r for g in results.values() for title, r in g["rows"].items()}
    g = parts.groups
    learned = {title for title, r in rows.items() if r["kind"] == "learned"}
    assert learned == {g.TWA, g.PAPER}
    assert {g.DROP, g.LONG_DROP, g.COSINE, g.WHOLE} <= set(rows)
    assert {r["steps"] for title, r in rows.items() if title != g.WHOLE} == {task.total}
    assert rows[g.WHOLE]["steps"] == 2 * task.total
    assert all(0 < r["accuracy"] <= 100 for r in rows.values())
    notes = results["digits-cnn", 0, "twa"]["notes"]
    assert notes["losses"]
    assert 0 < notes["measuring_seconds"] < notes["phase_seconds"] < notes["seconds"]
    assert results["digits-cnn", 0, "paper"]["notes"]["losses"] == {}
    second = {("digits-cnn", 1, name): g for (_, _, name), g in results.items()}
    text = parts.tables.claims({**results, **second}, {"digits-cnn": task})
    for title in rows:
        assert f"| {title} |" in text
    assert "### Time" in text
    studied = {
        ("digits-cnn", seed, name): results["digits-cnn", 0, name]
        for seed in (0, 1)
        for name in ("fixed", "twa")
    }
    assert "| TWA |" in parts.tables.study(studied, {"digits-cnn": task})


def test_trained_on_held_out_data_a_part_of_them_is_left_to_choose_by(parts, small) -> None:
    group = parts.groups.study(small, 3, "trained on held-out data")
    assert group["notes"]["losses"]


def test_every_setting_of_the_study_is_one(parts) -> None:
    for setting in parts.groups.STUDY.values():
        TWACallback(**setting)


def test_soups_of_networks_with_batchnorm(parts, small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts.soups, "SOUP_RUNS", 3)
    monkeypatch.setattr(parts.soups, "EPOCHS", 1)

    def net(seed: int) -> torch.nn.Module:
        return small.module(seed).net

    kind = parts.soups.Kind(lambda seed, both: small.data(seed), net, (-3.0, -2.0), (1, 3))
    rows = parts.soups.soups(kind, 0, str(tmp_path))["rows"]
    assert {"TWA-v", "TWA-t", "uniform soup", "greedy soup by NLL", "Model Stock"} <= set(rows)
    assert all(math.isfinite(r["nll"]) and r["nll"] < 10 for r in rows.values())
    results = {("language-soup", seed, "soups"): {"rows": rows, "notes": {}} for seed in (0, 1)}
    assert "| Model Stock |" in parts.tables.claims(results, {})
    assert "| TWA-t |" in parts.tables.study(results, {})


class InProcess:
    """A pool that runs at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def submit(self, function: Any, *args: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except ValueError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def calls(parts, monkeypatch) -> Any:
    """The seeds that jobs were run for; seed 7 fails."""
    called: list[int] = []

    def compute(job: Any, options: Any) -> Any:
        called.append(job.seed)
        if job.seed == 7:
            raise ValueError("seven")
        return {"rows": {"a": row(float(job.seed))}, "notes": {}}

    monkeypatch.setattr(parts.claims, "compute", compute)
    monkeypatch.setattr(parts.claims, "ProcessPoolExecutor", InProcess)
    threads = torch.get_num_threads()
    yield called
    torch.set_num_threads(threads)


def test_finished_results_are_kept_and_those_of_other_code_are_not(parts, calls, tmp_path) -> None:
    claims, options = parts.claims, parts.tasks.Options()
    jobs = [claims.Job("digits-cnn x0.5", seed, "twa") for seed in range(3)]
    first, failed = claims.run(jobs, tmp_path, 2, options)
    assert sorted(calls) == [0, 1, 2]
    assert first[jobs[2]]["rows"] == {"a": row(2.0)}
    assert failed == []
    claims.path_of(jobs[1], tmp_path).write_text('{"code": "')  # cut off
    stale = json.loads(claims.path_of(jobs[2], tmp_path).read_text())
    claims.path_of(jobs[2], tmp_path).write_text(json.dumps({**stale, "code": "other"}))
    assert claims.run(jobs, tmp_path, 2, options) == (first, [])
    assert sorted(calls[3:]) == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_job_that_fails_does_not_stop_the_others(parts, calls, tmp_path, capsys) -> None:
    jobs = [parts.claims.Job("stream", seed, "fixed") for seed in (6, 7, 8)]
    results, failed = parts.claims.run(jobs, tmp_path, 1, parts.tasks.Options())
    assert sorted(job.seed for job in results) == [6, 8]
    assert failed == [jobs[1]]
    assert "failed: ValueError('seven')" in capsys.readouterr().err


def test_after_the_budget_nothing_is_started(parts, calls, tmp_path) -> None:
    jobs = [parts.claims.Job("stream", seed, "fixed") for seed in range(3)]
    options = parts.tasks.Options()
    assert parts.claims.run(jobs, tmp_path, 2, options, budget=0.0) == ({}, [])
    assert calls == []


def test_results_depend_on_the_options_of_their_task_alone(parts) -> None:
    claims, options = parts.claims, parts.tasks.Options()
    other = dataclasses.replace(options, stream_width=8, fashion="elsewhere")
    for name, same in (("stream", False), ("fashion", True), ("digits-cnn", True)):
        job = claims.Job(name, 0, "fixed")
        assert (claims.fingerprint(job, options) == claims.fingerprint(job, other)) is same
