"""How much memory a process may still take, and how it is said."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device, for the CPU also within the limit of a container. None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [free for free in (_of_machine(), *(_of_group(*files) for files in CGROUPS)) if free is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    return _entry("/proc/meminfo", "MemAvailable:", 1024)


def _of_group(limit: str, used: str, statistics: str) -> int | None:
    """What a container's limit leaves. Files that it keeps in memory count as free."""
    try:
        most, now = int(Path(limit).read_text()), int(Path(used).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return most - now + (_entry(statistics, "inactive_file", 1) or 0)


def _entry(path: str, name: str, unit: int) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
        return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)
    except (OSError, ValueError, IndexError):
        return None


def said_bytes(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def said_seconds(seconds: float) -> str:
    """A time as people say it."""
    for most, unit, name in ((100, 1, "s"), (100 * 60, 60, "minutes"), (48 * 3600, 3600, "hours")):
        if seconds < most:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds / 86400:.3g} days"
