"""Memory a process may still take, and the most it has taken."""

from __future__ import annotations

import contextlib
from pathlib import Path


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns free memory: that of the machine, or what is left of the cgroup's limit if less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            granted = int((cgroup / limit).read_text(encoding="ascii"))
            used = int((cgroup / usage).read_text(encoding="ascii"))
            return min(available, max(0, granted - used))
    return available


def peak_resident_bytes() -> int:
    """Returns the highest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
