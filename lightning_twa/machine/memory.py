"""How much memory there is, and how much of it is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

__all__ = ["free_bytes", "total_bytes", "unreserved_bytes"]

# Of a memory cgroup: its limit, what it uses, and what of that is a cache that gives way
VERSIONS = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_bytes(device: torch.device, processes: int = 1, root: Path = Path("/")) -> int | None:
    """Memory that is free on a device. A container's limit counts, not its host's memory.

    Args:
        device: A CUDA device, or another, for which main memory counts.
        processes: Number of processes that share main memory.
        root: Where ``proc`` and ``sys`` are.

    Returns:
        Bytes, ``None`` where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = [*_in_cgroups(root, _left)]
    main = _on_host(root, "MemAvailable", "SC_AVPHYS_PAGES")
    if main is not None:
        free.append(main)
    return max(min(free), 0) // processes if free else None


def unreserved_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that no process has reserved: without what torch keeps for the next
    training step, which is free between two of them.
    """
    return int(torch.cuda.mem_get_info(device)[0])


def total_bytes(device: torch.device, processes: int = 1, root: Path = Path("/")) -> int | None:
    """Memory that a device has, whoever uses it; swap space counts as main memory. A container has
    what its limit says.

    Args:
        device: A CUDA device, or another, for which main memory counts.
        processes: Number of processes that share main memory.
        root: Where ``proc`` and ``sys`` are.

    Returns:
        Bytes, ``None`` where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    totals = [*_in_cgroups(root, _limit)]
    main = _on_host(root, "MemTotal", "SC_PHYS_PAGES")
    if main is not None:
        totals.append(main)
    swap = _on_host(root, "SwapTotal", "")
    return (min(totals) + (swap or 0)) // processes if totals else None


def _on_host(root: Path, field: str, pages: str) -> int | None:
    """Bytes by a field of ``meminfo``, or by a number of pages that other systems tell."""
    try:
        with open(root / "proc" / "meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _in_cgroups(root: Path, read: Callable[[Path, int], int | None]) -> Iterator[int]:
    """A value of each memory cgroup that this process is in, or below, where it has one."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, base = 2, root / "sys" / "fs" / "cgroup"
        elif "memory" in controllers.split(","):
            version, base = 1, root / "sys" / "fs" / "cgroup" / "memory"
        else:
            continue
        inner = base / path.lstrip("/")
        # In a container the path may be the host's, and what it sees at the base is its own
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                found = read(folder, version)
                if found is not None:
                    yield found


def _limit(folder: Path, version: int) -> int | None:
    try:
        return int((folder / VERSIONS[version][0]).read_text())
    except (OSError, ValueError):
        return None


def _left(folder: Path, version: int) -> int | None:
    """Of the limit."""
    limit, usage, cache = VERSIONS[version]
    try:
        highest = int((folder / limit).read_text())  # "max" where there is none
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return highest - used + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None
