"""The paper's three claims, measured beside what they have to beat, on real data.

Every finished (task, seed) is a file in ``--out``, so that an interrupted command goes on where it
was; a file that other code or other settings wrote is not used. The tables go to stdout and to
``claims.md``, the numbers to ``claims.json``; progress to stderr.

    python examples/benchmarks/claims.py --out results             # seeds 200 to 204
    python examples/benchmarks/claims.py --out results --study     # settings, on tuning seeds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import claims_methods
import claims_tables
import lightning
import torch
from claims_tasks import TASKS

import lightning_twa

SOUP = "language-soup"
RATE_TASKS = ("digits-cnn", "digits-vit")
Job = tuple[str, str, int]  # function of claims_methods, task, seed


def fingerprint() -> str:
    """Of the code that makes the numbers."""
    here = Path(__file__).parent
    files = [here / f"claims_{part}.py" for part in ("tasks", "runs", "methods")]
    files += sorted(Path(lightning_twa.__file__).parent.rglob("*.py"))
    contents = b"\0".join(file.read_bytes() for file in files)
    versions = f"{sys.version} {torch.__version__} {lightning.__version__}"
    return hashlib.sha256(contents + versions.encode()).hexdigest()[:16]


def path_of(job: Job, out: Path) -> Path:
    """Where the result of a job is."""
    return out / f"{'-'.join(job[:2])}-{job[2]}.json"


def read(job: Job, out: Path, code: str) -> claims_methods.Rows | None:
    """The rows of a finished job; ``None`` where there are none of this code."""
    try:
        result: dict[str, Any] = json.loads(path_of(job, out).read_text())
    except (OSError, ValueError):
        return None
    return result["rows"] if result.get("code") == code else None


def work(job: Job, out: Path, code: str) -> float:
    """Run a job and write its rows; returns the seconds it took."""
    torch.set_num_threads(1)
    kind, task, seed = job
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = getattr(claims_methods, kind)(task, seed, Path(folder))
    target = path_of(job, out)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"code": code, "rows": rows}, indent=1))
    os.replace(temporary, target)
    return time.perf_counter() - began


def run(jobs: list[Job], out: Path, processes: int) -> dict[Job, claims_methods.Rows]:
    """All jobs, those first that are not finished yet."""
    out.mkdir(parents=True, exist_ok=True)
    code = fingerprint()
    missing = [job for job in jobs if read(job, out, code) is None]
    done = len(jobs) - len(missing)
    if done:
        print(f"{done} of {len(jobs)} results are there already", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(work, job, out, code): job for job in missing}
        for future in as_completed(futures):
            done += 1
            kind, task, seed = futures[future]
            seconds = future.result()
            print(
                f"[{done}/{len(jobs)}] {kind}, {task}, seed {seed}: {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    results = {job: read(job, out, code) for job in jobs}
    return {job: rows for job, rows in results.items() if rows is not None}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, SOUP], default=[*TASKS, SOUP])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, help="200, or 100 with --study")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--study", action="store_true", help="compare settings of the phase")
    args = parser.parse_args()
    default = 100 if args.study else 200  # seeds 0 to 9 have been looked at often
    first = default if args.first_seed is None else args.first_seed
    seeds = range(first, first + args.seeds)
    tasks = [task for task in args.tasks if task != SOUP]
    if args.study:
        jobs: list[Job] = [("study", task, seed) for seed in seeds for task in tasks]
        jobs += [("soup_study", SOUP, seed) for seed in seeds if SOUP in args.tasks]
    else:
        jobs = [("generalization", task, seed) for seed in seeds for task in tasks]
        jobs += [("soups", SOUP, seed) for seed in seeds if SOUP in args.tasks]
        jobs += [("rates", task, seed) for seed in seeds for task in tasks if task in RATE_TASKS]
    began = time.perf_counter()
    results = run(jobs, args.out, args.processes)
    text = claims_tables.study(results) if args.study else claims_tables.claims(results)
    name = "study" if args.study else "claims"
    (args.out / f"{name}.md").write_text(text)
    flat = {"-".join(map(str, job)): rows for job, rows in results.items()}
    (args.out / f"{name}.json").write_text(json.dumps(flat, indent=1))
    print(text)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
