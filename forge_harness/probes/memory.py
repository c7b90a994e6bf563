"""Memory a process may still take, and the most it has taken."""

from __future__ import annotations

from pathlib import Path

from forge_harness.probes import cgroup


def available_bytes(root: Path = cgroup.ROOT, membership: Path = cgroup.MEMBERSHIP) -> int:
    """Returns free memory: that of the machine, or what is left of a container's limit if less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    left = cgroup.memory_left(root, membership)
    return available if left is None else min(available, left)


def peak_resident_bytes() -> int:
    """Returns the highest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
