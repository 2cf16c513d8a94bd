"""The examples run as a user runs them, and print what they promise."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import load_script

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"[+-]\d+\.\d+"


def run_example(name: str, *arguments: str) -> str:
    """Standard output of ``examples/<name>``; fails with its errors if it does."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def parse_table(output: str) -> dict[str, tuple[int, float, float, float]]:
    """Name to epochs, mean and deviation of the accuracy, and NLL, of the only table."""
    header, rule, *body = [line for line in output.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "weights",
        "epochs",
        "test accuracy (%)",
        "test NLL",
    ]
    assert set(rule) <= set("|-:")
    rows = {}
    for line in body:
        name, epochs, accuracy, nll = (cell.strip() for cell in line.strip("|").split("|"))
        mean, spread = accuracy.split(" ± ")
        rows[name] = (int(epochs), float(mean), float(spread), float(nll))
    assert len(rows) == len(body), "two rows have the same name"
    return rows


FAST = ("--full-epochs", "8", "--epochs", "6", "--phase-epochs", "2")
EPOCHS = {
    "last iterate": 6,
    "uniform over all epochs (SWA)": 6,
    "uniform over the last half": 6,
    "EMA 0.97 per step": 6,
    "ordinary LR drop to 0": 6,
    "TWA (default)": 6,
    'TWA-v (data="val")': 6,
    "TWA-t, 2 epochs, nothing chosen": 6,
    "full schedule": 8,
}


@pytest.mark.slow
def test_digits_prints_every_row_and_says_where_twa_does_not_win() -> None:
    output = run_example("digits.py", "--seeds", "2", *FAST)

    rows = parse_table(output)
    assert {name: row[0] for name, row in rows.items()} == EPOCHS
    for _, mean, spread, nll in rows.values():
        assert 0 <= mean <= 100
        assert math.isfinite(spread)
        assert math.isfinite(nll)

    # the verdicts are computed from the table's numbers
    for title, column, sign in (("Accuracy in points", 1, 1), ("NLL", 3, -1)):
        match = re.search(rf"^{title}, against the best fixed average, (.*):$", output, re.M)
        assert match is not None
        best = match[1]
        fixed = [name for name in rows if name.startswith(("uniform", "EMA"))]
        assert sign * rows[best][column] == max(sign * rows[name][column] for name in fixed)
        section = output[match.end() :].split("\n\n")[0]
        found = re.findall(rf"^- (.*): ({NUMBER}) ± (\d+\.\d+), ([a-z ]+)\. ", section, re.M)
        assert [name for name, *_ in found] == [name for name in rows if name.startswith("TWA")]
        for name, mean, _, _ in found:
            difference = sign * (rows[name][column] - rows[best][column])
            assert float(mean) == pytest.approx(difference, abs=0.02)

    assert re.search(r"^TWA \(default\), seed 0: loss on the validation data, ", output, re.M)
    assert re.search(r"^  power\(0.13\) +\d", output, re.M)
    weights = re.search(r"^Averaging weights of TWA \(default\), .*: (.*)$", output, re.M)
    assert weights is not None
    learned = re.findall(rf"(\S+) ({NUMBER})", weights[1])
    assert {"power(0.02)", "mean", "epoch=2"} <= {name for name, _ in learned}
    assert sum(float(weight) for _, weight in learned) == pytest.approx(1, abs=0.01)


# --- adapters


@pytest.mark.long
def test_lora_compares_averages_of_adapters() -> None:
    pytest.importorskip("peft")
    small = ("--seeds", "2", "--collect-epochs", "4", "--twa-epochs", "1")
    output = run_example("lora.py", *small, "--windows", "32", "--pretrain-bytes", "20000")
    rows = {}
    for line in output.splitlines()[2:9]:
        name, epochs, bits, gain = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = (int(epochs), bits, gain)
    assert {name: epochs for name, (epochs, _, _) in rows.items()} == {
        "pretrained": 0,
        "constant learning rate": 4,
        "uniform average of the candidates": 4,
        "learning rate falls to 0": 5,
        "uniform average, trained on": 5,
        "TWA-t": 5,
        "TWA-v": 5,
    }
    means = {name: float(bits.split(" ± ")[0]) for name, (_, bits, _) in rows.items()}
    assert all(0 < mean < 8 for mean in means.values())
    assert means["TWA-t"] < means["pretrained"]
    for name, (_, _, gain) in rows.items():
        if name == "TWA-t":
            assert gain == ""
        else:
            assert re.fullmatch(rf"{NUMBER} ± \d+\.\d+", gain)
            assert float(gain.split()[0]) == pytest.approx(means[name] - means["TWA-t"], abs=2e-4)
    assert "36,864 of 409,440 parameters are trained" in output
    with_candidates, without = map(float, re.findall(r"(\d+\.\d+)(?: MiB,|\.$)", output, re.M)[:2])
    copies = 4 + 6  # snapshots and running averages, each of what is trained
    assert 0 < with_candidates - without < copies * 4 * 36_864 / 2**20 + 0.1


# --- what the verdict says of made-up scores


@pytest.fixture(scope="module")
def digits() -> Any:
    """The example as a module."""
    return load_script(EXAMPLES / "digits.py")


def made_up(digits: Any, twa: list[tuple[float, float]]) -> Any:
    """Rows with two seeds' worth of baselines, cut to as many seeds as ``twa`` has."""

    def row(kind: str, *scores: tuple[float, float]) -> Any:
        return digits.Row(kind, 1, [digits.Score(*score) for score in scores[: len(twa)]])

    return {
        "last": row("trained", (70.0, 0.9), (72.0, 0.8)),
        "uniform": row("fixed", (80.0, 0.5), (82.0, 0.4)),
        "EMA": row("fixed", (79.0, 0.9), (81.0, 0.2)),
        "TWA": row("twa", *twa),
    }


@pytest.mark.parametrize(
    ("twa", "accuracy", "nll"),
    [
        (
            [(83.0, 0.3), (85.1, 0.19)],
            "+3.05 ± 0.05, better. Clearly better than all.",
            "+0.205 ± 0.005, better. No clear difference from: EMA.",
        ),
        (
            [(77.0, 0.6), (79.1, 0.51)],
            "-2.95 ± 0.05, worse. Clearly worse than: uniform; EMA.",
            "-0.105 ± 0.005, worse. No clear difference from: EMA. Clearly worse than: uniform.",
        ),
        (
            [(79.0, 0.5), (84.0, 0.4)],
            "+0.50 ± 1.50, no clear difference. No clear difference from: last; uniform; EMA.",
            "+0.000 ± 0.000, no clear difference. No clear difference from: uniform; EMA.",
        ),
        (
            [(99.0, 0.1)],
            "+19.00 ± nan, no clear difference. No clear difference from: last; uniform; EMA.",
            "+0.400 ± nan, no clear difference. No clear difference from: last; uniform; EMA.",
        ),
    ],
    ids=["better", "worse", "neither", "one seed"],
)
def test_verdict(digits: Any, twa: list[tuple[float, float]], accuracy: str, nll: str) -> None:
    lines = digits.verdict(made_up(digits, twa)).splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        f"- TWA: {accuracy}",
        f"- TWA: {nll}",
    ]


@pytest.mark.slow
def test_minimal_prints_accuracy_and_averaging_weights() -> None:
    output = run_example("minimal.py")
    accuracy = re.search(r"^test accuracy of the average: (\d+\.\d+) %", output, re.M)
    assert accuracy is not None
    assert float(accuracy[1]) > 80  # chance is 10
    learned = re.findall(rf"^({NUMBER}) of (\S+)$", output, re.M)
    power = [*(f"power({width})" for width in (0.02, 0.056, 0.13, 0.23)), "mean"]
    snapshots = [f"epoch={epoch}" for epoch in range(9, 19)]
    assert [name for _, name in learned] == [*power, *snapshots, "step=387"]
    assert sum(float(weight) for weight, _ in learned) == pytest.approx(1, abs=0.01)


def rows_of(output: str, title: str) -> list[list[str]]:
    """Cells of the first table after a title."""
    lines = output[output.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    body = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


# Of the benchmarks, overhead.py runs in `make test`, and all of them are loaded.


@pytest.mark.slow
@pytest.mark.long
def test_communication_counts_what_each_scheme_sends(tmp_path: Path) -> None:
    d, n = 40_000, 4
    small = ("--numel", str(d), "--candidates", str(n), "--rounds", "2", "--bandwidth", "10")
    far = ("--far-numel", "1e6", "1e10", "--far-processes", "8", "--far-candidates", str(n))
    saved = tmp_path / "rows.json"
    output = run_example(
        "benchmarks/communication.py", *small, *far, "--model", "--json", str(saved)
    )
    sent = {row["scheme"]: row["sent"] for row in json.loads(saved.read_text())}
    message = 8 * (n + 1)  # half of twice it: two processes
    assert sent["DDP AdamW"] == 4 * d
    assert sent["paper, rows"] == 2 * sent["DDP AdamW"]
    assert sent["replicate, 32 bits"] == sent["replicate, 4 bits"] == message
    for bits in (32, 4):
        padded = sent[f"shard, {bits} bits"] - message
        assert 4 * d <= padded <= 4 * (d + 2 * 8192)
    assert [row[0] for row in rows_of(output, "2 processes")] == list(sent)

    kept = rows_of(output, "Sent, GB a step and GPU")
    assert kept[0][4] == kept[1][4], "what replicate sends does not depend on D"
    assert float(kept[1][2]) == pytest.approx(1e4 * float(kept[0][2]), rel=1e-2)
    times = rows_of(output, "Optimizer step and exchange, ms")
    assert [cell == "-" for cell in times[0][2:]] == [False] * 6
    assert [cell == "-" for cell in times[1][2:]] == [True] * 4 + [False] * 2


@pytest.mark.slow
@pytest.mark.long
def test_checkpointing_prints_what_checkpoints_and_candidates_take() -> None:
    width, n = 64, 4
    small = ("--width", str(width), "--candidates", str(n), "--rounds", "1")
    output = run_example("benchmarks/checkpointing.py", *small)
    rows = rows_of(output, "candidates in")
    moments = ["collecting", "in the phase", "finished"]
    assert [row[:2] for row in rows] == [
        *([name, moment] for name in ("plain", "memory", "files") for moment in moments),
        *([f"{name}, subspace in a file", "in the phase"] for name in ("memory", "files")),
    ]
    megabytes = {(name, moment): float(cells[0]) for name, moment, *cells in rows}
    parameters = 4 * (width + 1) * width * 4 / 1e6
    for moment, copies in zip(moments, (n - 1, n, 0), strict=True):
        added = megabytes["memory", moment] - megabytes["plain", moment]
        assert added == pytest.approx(copies * parameters, abs=0.1)
        assert megabytes["files", moment] == pytest.approx(megabytes["plain", moment], abs=0.1)
    for kind in ("memory", "files"):  # checkpoints do not hold it
        cached = megabytes[f"{kind}, subspace in a file", "in the phase"]
        assert cached == pytest.approx(megabytes[kind, "in the phase"], abs=0.1)
    kept = {row[0]: float(row[3]) for row in rows_of(output, "| what |")}
    assert kept["memory, float32"] == kept["files, float32"] == pytest.approx(parameters, abs=0.1)


@pytest.mark.parametrize("script", sorted(p.name for p in (EXAMPLES / "benchmarks").glob("*.py")))
def test_every_benchmark_finds_what_it_imports(script, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    assert load_script(EXAMPLES / "benchmarks" / script).__doc__


@pytest.mark.long
def test_overhead_prints_a_row_for_each_size() -> None:
    small = ("--rounds", "1", "--widths", "4", "--candidates", "3", "--batch-size", "2")
    header, _, row = run_example("benchmarks/overhead.py", *small).splitlines()[-3:]
    assert len(row.split("|")) == len(header.split("|"))
    cells = [float(cell.replace(",", "")) for cell in row.strip("|").split("|")]
    assert cells[1] == 3
    assert all(cell > 0 for cell in cells[:-1])  # building may round to no time


@pytest.mark.long
def test_running_averages_are_measured_beside_steps() -> None:
    rows = [
        [float(cell.strip(" %").replace(",", "")) for cell in line.strip("|").split("|")]
        for line in run_example("benchmarks/running_averages.py", "--rounds", "1").splitlines()
        if re.match(r"\| \d", line)
    ]
    assert [row[0] for row in rows] == [1, 5, 1, 5]
    for n, update, step, ratio in rows[:2]:
        assert ratio == pytest.approx(update / step / n, abs=0.02)
    for n, update, step, share, each in rows[2:]:
        assert share == pytest.approx(100 * update / step, abs=0.3)
        assert each == pytest.approx(share / n, abs=0.1)


@pytest.mark.long
def test_plots_are_drawn(tmp_path) -> None:
    quick = ("--epochs", "7", "--start-epoch", "6", "--points", "3")
    written = run_example("plots.py", str(tmp_path), *quick).splitlines()[:10]
    for path in written:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    names = ["averaging-weights", "heldout", "loss-path", "path", "subspace"]
    both = [f"{name}{suffix}.png" for suffix in ("", "-dark") for name in names]
    assert [Path(path).name for path in written] == both


@pytest.mark.long
def test_building_is_measured_beside_its_two_products() -> None:
    small = ("--rounds", "1", "--sizes", "70000", "--candidates", "3", "--bits", "4", "--skip-peak")
    header, _, row = run_example("benchmarks/build.py", *small).splitlines()[-3:]
    assert row.count("|") == header.count("|")
    assert [cell.strip() for cell in row.strip("|").split("|")][:3] == ["70,000", "3", "4"]


def test_the_cost_model_of_building_finds_its_constants(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    build = load_script(EXAMPLES / "benchmarks" / "build.py")
    sizes = [(d, n, bits) for d, n in build.FITTED for bits in (4, 32)]
    matrix = torch.tensor([build.terms(*size) for size in sizes], dtype=torch.float64)
    exact = torch.tensor([3e-9, 2e-11, 5e-9, 0.0], dtype=torch.float64)
    found = build.non_negative(matrix, matrix @ exact)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-14)
    assert bool((build.non_negative(matrix, matrix @ -exact + 1) >= 0).all())
