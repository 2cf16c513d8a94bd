"""Processes that race for, share and are killed while writing candidate files; needs fork.

``python -m helpers.files FOLDER`` runs them, apart from whatever a test process holds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_twa.candidates import Candidate, files

MIB = 2**20


def weights(name: str = "epoch=3") -> Candidate:
    parts = {str(i): torch.full((MIB // 4,), float(i)) for i in range(8)}
    return Candidate(name, parts, {"count": torch.tensor(3)})


def fork(work: Callable[[], object]) -> tuple[int, int]:
    """Start work in a child; its number, and a pipe with what it returned."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            os.write(write, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    return child, read


def join(child: int, read: int) -> tuple[int, Any]:
    """Wait for a child of :func:`fork`; its wait status and what it returned."""
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    return os.waitpid(child, 0)[1], json.loads(text) if text else None


def mapped(path: Path) -> dict[str, int]:
    """KiB of a file's mapping in this process, from the kernel."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and key != "VmFlags:":
            sums[key[:-1]] = sums.get(key[:-1], 0) + int(values[0])
    return sums


def race(root: Path) -> list[list[str]]:
    def work() -> list[str]:
        while time.time() < start:
            pass
        return [files.make_directory(root / "deep" / "race").name for _ in range(25)]

    start = time.time() + 0.1
    children = [fork(work) for _ in range(4)]
    return [join(*child)[1] for child in children]


def share(root: Path) -> list[dict[str, int]]:
    """Two processes map a file and touch every page; both look while both have it."""
    reference = files.write_candidate(root, files.make_directory(root), weights())
    path = root.resolve() / reference.file
    barrier = [os.pipe(), os.pipe()]

    def work(me: int) -> dict[str, int]:
        candidate = files.read_candidate(root, reference)
        total = sum(float(t.sum()) for t in candidate.parameters.values())
        assert total == sum(range(8)) * MIB // 4
        os.write(barrier[1 - me][1], b"x")
        os.read(barrier[me][0], 1)
        result = mapped(path)
        os.write(barrier[1 - me][1], b"x")
        os.read(barrier[me][0], 1)
        return result

    children = [fork(lambda me=me: work(me)) for me in range(2)]
    return [join(*child)[1] for child in children]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill(root: Path) -> list[list[object]]:
    """Writers that kill themselves at every step: whether killed, and what they leave behind."""
    results = []
    for step in ["header", "write", "fsync", "link", "unlink", "directory"]:
        directory = files.make_directory(root / "killed")

        def work(step: str = step, directory: Path = directory) -> None:
            encode, fsync = files.encode, files.os.fsync

            def dying(*args: Any) -> Any:
                for i, part in enumerate(encode(*args)):
                    if i == (0 if step == "header" else 4):
                        die()
                    yield part

            if step in ("header", "write"):
                files.encode = dying
            elif step == "fsync":
                files.os.fsync = lambda *_: die()
            elif step == "link":
                files.os.link = lambda *_: die()
            elif step == "unlink":
                Path.unlink = lambda *_, **__: die()
            else:
                files.os.fsync = lambda fd: (
                    die() if os.path.isdir(f"/proc/self/fd/{fd}") else fsync(fd)
                )
            files.write_candidate(root, directory, weights())

        status, _ = join(*fork(work))
        results.append([step, os.WTERMSIG(status), str(directory)])
    return results


def kill_anytime(root: Path) -> str:
    """Writers killed from outside after a random time."""
    directory = files.make_directory(root / "anytime")
    files.write_candidate(root, directory, weights("first"))

    def work(i: int) -> None:
        for k in range(1000):
            files.write_candidate(root, directory, weights(f"step={i}-{k}"))

    random.seed(0)
    for i in range(12):
        child, read = fork(lambda i=i: work(i))
        time.sleep(random.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        join(child, read)
    return str(directory)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                "race": race(root),
                "share": share(root),
                "kill": kill(root),
                "anytime": kill_anytime(root),
            }
        )
    )
