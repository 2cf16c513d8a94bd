"""How much memory is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["free_bytes"]

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
    free = [*_free_in_cgroups(root)]
    main = _free_on_host(root)
    if main is not None:
        free.append(main)
    return max(min(free), 0) // processes if free else None


def _free_on_host(root: Path) -> int | None:
    try:
        with open(root / "proc" / "meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """What is left of the limit of each memory cgroup that this process is in, or below."""
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
                left = _left(folder, version)
                if left is not None:
                    yield left


def _left(folder: Path, version: int) -> int | None:
    limit, usage, cache = VERSIONS[version]
    try:
        highest = int((folder / limit).read_text())  # "max" where there is none
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return highest - used + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None
