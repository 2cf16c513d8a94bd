"""The paper's claims at equal total optimizer steps, beside what they have to beat, on real data.

Every finished (task, seed, group of rows) is a file in ``--out``, so that an interrupted command
goes on where it was; a file that other code or other options wrote is not used. The tables, of
what is there, go to stdout and to ``claims.md``; progress goes to stderr.

    python examples/benchmarks/claims.py --out results             # seeds from 200 on
    python examples/benchmarks/claims.py --out results --fashion DIR --budget 40
    python examples/benchmarks/claims.py --out results --study     # settings, on tuning seeds
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import claims_groups
import claims_larger
import claims_soups
import claims_tables
import lightning
import torch
from claims_tasks import Options, tasks

import lightning_twa

SOUP, VISION_SOUP = "language-soup", "vision-soup"
STUDIED = ("digits-cnn", "digits-vit", "language", "digits-transfer", "noise-20", SOUP)
PLAIN = ("fixed", "cosine")  # groups that no code of the package makes


class Job(NamedTuple):
    """What is run, and written, at once."""

    task: str
    seed: int
    group: str


def fingerprint(job: Job, options: Options) -> str:
    """Of the code that makes the numbers of a job, and of the options."""
    here = Path(__file__).parent
    parts = ["data", "larger", "tasks", "runs", "groups"] + ["soups"] * job.task.endswith("soup")
    files = [here / f"claims_{part}.py" for part in parts]
    if job.group not in PLAIN:
        files += sorted(Path(lightning_twa.__file__).parent.rglob("*.py"))
    contents = b"\0".join(file.read_bytes() for file in files)
    kind = job.task.partition("-")[0] + "_"
    shown = {k: v for k, v in dataclasses.asdict(options).items() if k.startswith(kind)}
    versions = f"{sys.version} {torch.__version__} {lightning.__version__} {shown}"
    return hashlib.sha256(contents + versions.encode()).hexdigest()[:16]


def path_of(job: Job, out: Path) -> Path:
    """Where the result of a job is."""
    name = "-".join([job.task, str(job.seed), job.group])
    return out / f"{''.join(c if c.isalnum() or c in '-.' else '_' for c in name)}.json"


def read(job: Job, out: Path, code: str) -> claims_groups.Group | None:
    """A finished job; ``None`` where there is none of this code."""
    try:
        result: dict[str, Any] = json.loads(path_of(job, out).read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("code") == code else None


def compute(job: Job, options: Options) -> claims_groups.Group:
    """Run a job."""
    if job.task in (SOUP, VISION_SOUP):
        kind = claims_soups.kind_of(job.task, options)
        with tempfile.TemporaryDirectory() as folder:
            return getattr(claims_soups, job.group)(kind, job.seed, folder)
    task = tasks(options)[job.task]
    if job.group.startswith("study "):
        return claims_groups.study(task, job.seed, job.group.removeprefix("study "))
    return claims_groups.GROUPS[job.group](task, job.seed)


def work(job: Job, out: Path, code: str, options: Options) -> float:
    """Run a job and write its rows; returns the seconds it took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    result = {"code": code, **compute(job, options)}
    target = path_of(job, out)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, target)
    return time.perf_counter() - began


def run(
    jobs: list[Job], out: Path, processes: int, options: Options, budget: float | None = None
) -> tuple[dict[Job, claims_groups.Group], list[Job]]:
    """All jobs that are not finished yet, in turn; after ``budget`` minutes none is started.

    Returns:
        What is there of them in the end, and those that failed, after which the others went on.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    codes = {job: fingerprint(job, options) for job in jobs}
    missing = [job for job in jobs if read(job, out, codes[job]) is None]
    done, left = len(jobs) - len(missing), iter(missing)
    failed: list[Job] = []
    print(f"{done} of {len(jobs)} results are there", file=sys.stderr)

    def another() -> Job | None:
        late = budget is not None and time.perf_counter() - began >= 60 * budget
        return None if late else next(left, None)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures: dict[Future[float], Job] = {}
        while True:
            while len(futures) < processes and (job := another()) is not None:
                futures[pool.submit(work, job, out, codes[job], options)] = job
            if not futures:
                break
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                job, done = futures.pop(future), done + 1
                minutes = (time.perf_counter() - began) / 60
                error = future.exception()
                said = f"failed: {error!r}" if error else f"{future.result():.0f} s"
                failed += [job] * (error is not None)
                print(
                    f"[{done}/{len(jobs)}, {minutes:.1f} min] {job.task}, seed {job.seed}, "
                    f"{job.group}: {said}",
                    file=sys.stderr,
                    flush=True,
                )
    results = {job: read(job, out, codes[job]) for job in jobs}
    return {job: result for job, result in results.items() if result is not None}, failed


def planned(args: argparse.Namespace, options: Options) -> list[Job]:
    """The jobs in the order in which they are worth most: a seed of everything after another."""
    found = tasks(options)
    default = 100 if args.study else 200  # seeds 0 to 9 have been looked at often
    first = default if args.first_seed is None else args.first_seed
    names = args.tasks or (STUDIED if args.study else [*found, SOUP])
    jobs: list[Job] = []
    for i in range(max(args.seeds, args.fashion_seeds, args.stream_seeds)):
        for name in names:
            large = {"fashion": args.fashion_seeds, "stream": args.stream_seeds}
            count = 1 if name.startswith("fashion-noise") else large.get(name, args.seeds)
            if i >= count:
                continue
            if name in (SOUP, VISION_SOUP):
                groups = ["soup_study" if args.study else "soups"]
            elif args.study:
                groups = ["fixed", *(f"study {setting}" for setting in claims_groups.STUDY)]
            else:
                groups = claims_groups.groups_of(found[name])
            jobs += [Job(name, first + i, group) for group in groups]
    return sorted(jobs, key=lambda job: job.task.startswith("fashion-noise"))  # long: last


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options()
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--tasks", nargs="+", help=f"names; by default all but {VISION_SOUP}")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, help="200, or 100 with --study")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budget", type=float, help="minutes after which no run is started")
    parser.add_argument("--fashion", help="folder with the .gz files of Fashion-MNIST")
    parser.add_argument("--fashion-epochs", type=int, default=default.fashion_epochs)
    parser.add_argument("--fashion-width", type=int, default=default.fashion_width)
    parser.add_argument("--fashion-seeds", type=int, default=3, help="without noise; one with it")
    parser.add_argument("--stream-steps", type=int, default=default.stream_steps)
    parser.add_argument("--stream-width", type=int, default=default.stream_width)
    parser.add_argument("--stream-seeds", type=int, default=3)
    parser.add_argument("--study", action="store_true", help="compare settings of the phase")
    args = parser.parse_args()
    options = Options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Options)})
    if options.fashion is None:
        print("Fashion-MNIST is skipped: --fashion names no folder.", file=sys.stderr)
    elif files := claims_larger.missing(Path(options.fashion)):
        parser.error(f"--fashion {options.fashion}: it lacks {', '.join(files)}")
    names = [*tasks(options), SOUP, VISION_SOUP]
    if VISION_SOUP in (args.tasks or ()) and (lacking := claims_soups.lacking(options)):
        parser.error(f"{VISION_SOUP} needs {lacking}")
    if unknown := set(args.tasks or ()) - set(names):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    jobs = planned(args, options)
    began = time.perf_counter()
    results, failed = run(jobs, args.out, args.processes, options, args.budget)
    missing = len(jobs) - len(results) - len(failed)
    text = (claims_tables.study if args.study else claims_tables.claims)(results, tasks(options))
    if missing:
        text += f"\n{missing} of {len(jobs)} results are missing: the same command makes them.\n"
    if failed:
        text += f"\nFailed: {'; '.join(' '.join(map(str, job)) for job in failed)}.\n"
    if options.fashion is None and not args.study:
        text += "\nFashion-MNIST was skipped: no folder was given.\n"
    name = "study" if args.study else "claims"
    (args.out / f"{name}.md").write_text(text)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
