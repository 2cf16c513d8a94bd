"""Free memory is what the system and the container leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_twa.machine import free_bytes, total_bytes

CPU = torch.device("cpu")
GIB = 2**30


def system(root: Path, cgroup: str, files: dict[str, str], available: int = 100 * GIB) -> Path:
    """A file system with 100 GiB available on the host."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: {120 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": str(used),
        f"{folder}memory.stat": f"anon 7\ninactive_file {cache}\n",
    }


def version_1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"memory/{folder}memory.limit_in_bytes": str(limit),
        f"memory/{folder}memory.usage_in_bytes": str(used),
        f"memory/{folder}memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


V1, V2 = "9:name=systemd:/\n4:cpu,memory:/a/b\n", "0::/a/b\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2, version_2("a/b/", f"{8 * GIB}", 3 * GIB), 5 * GIB),
        (V2, version_2("a/b/", f"{8 * GIB}", 3 * GIB, GIB), 6 * GIB),
        (V2, version_2("a/b/", "max", 3 * GIB), 100 * GIB),
        (V2, version_2("a/b/", "max", 1) | version_2("a/", f"{8 * GIB}", GIB), 7 * GIB),
        (V2, version_2("", f"{8 * GIB}", GIB), 7 * GIB),  # what a container sees of itself
        (V2, version_2("a/b/", f"{200 * GIB}", 0), 100 * GIB),
        (V2, version_2("a/b/", f"{GIB}", 2 * GIB), 0),
        (V2, {}, 100 * GIB),
        (V2, {"a/b/memory.max": "what?"}, 100 * GIB),
        (V1, version_1("a/b/", 8 * GIB, 3 * GIB, 2 * GIB), 7 * GIB),
        (V1, version_1("", 8 * GIB, 3 * GIB), 5 * GIB),
        (V1, version_1("a/b/", 2**63 - 4096, 3 * GIB), 100 * GIB),
        ("9:name=systemd:/\n", version_1("", GIB, 0), 100 * GIB),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, cgroup, files, expected) -> None:
    root = system(tmp_path, cgroup, files)
    assert free_bytes(CPU, root=root) == expected
    assert free_bytes(CPU, processes=4, root=root) == expected // 4


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2, version_2("a/b/", f"{8 * GIB}", 3 * GIB), 8 * GIB),
        (V2, version_2("a/b/", "max", 1) | version_2("a/", f"{9 * GIB}", GIB), 9 * GIB),
        (V2, {"a/b/memory.max": f"{7 * GIB}"}, 7 * GIB),
        (V2, version_2("a/b/", "max", 1), 120 * GIB),
        (V1, version_1("a/b/", 8 * GIB, 3 * GIB, 2 * GIB), 8 * GIB),
        (V1, version_1("a/b/", 2**63 - 4096, 3 * GIB), 120 * GIB),
    ],
)
def test_what_there_is_in_all(tmp_path, cgroup, files, expected) -> None:
    root = system(tmp_path, cgroup, files)
    assert total_bytes(CPU, root=root) == expected
    assert total_bytes(CPU, processes=4, root=root) == expected // 4
    with open(root / "proc" / "meminfo", "a") as file:
        file.write(f"SwapTotal: {GIB // 1024} kB\n")
    assert total_bytes(CPU, root=root) == expected + GIB
    assert free_bytes(CPU) <= total_bytes(CPU)


def test_without_cgroups_the_host_counts(tmp_path) -> None:
    root = system(tmp_path, "", {})
    (root / "proc" / "self" / "cgroup").unlink()
    assert free_bytes(CPU, root=root) == 100 * GIB


def test_without_meminfo_the_system_is_asked(tmp_path) -> None:
    found = free_bytes(CPU, root=tmp_path)
    assert found is None or found > 0


def test_this_machine_has_some() -> None:
    assert 0 < free_bytes(CPU) < 2**60
