"""How much memory is free."""

from __future__ import annotations

import os

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device, processes: int = 1) -> int | None:
    """Memory that is free on a device.

    Args:
        device: A CUDA device, or another, for which main memory counts.
        processes: Number of processes that share main memory.

    Returns:
        Bytes, ``None`` where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024 // processes
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    except (AttributeError, OSError, ValueError):
        return None
