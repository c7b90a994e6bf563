"""What the control groups of this process grant: processors and memory.

A limit set on any group between the root and the process binds it, so the tightest one counts.
In a container the root of the mount usually is the process's group; outside (systemd slices, build
runners) the limit is further down, and the files at the root say "no limit".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Returns the processors the groups grant, or None without a limit (v2 `cpu.max`, v1 CFS)."""
    grants = []
    for group in _groups("cpu", root, membership):
        quota, period = _numbers(group / "cpu.max", 2) or (None, None)
        if quota is None:
            (quota,) = _numbers(group / "cpu.cfs_quota_us", 1) or (None,)
            (period,) = _numbers(group / "cpu.cfs_period_us", 1) or (None,)
        if quota is not None and period is not None and quota > 0:
            grants.append(quota / period)
    return min(grants, default=None)


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Returns the bytes left below the tightest memory limit, or None without one.

    File cache the kernel has marked inactive is given back before anything is killed, so it
    counts as free, as container runtimes count it.
    """
    left = []
    for group in _groups("memory", root, membership):
        for limit, usage, stat in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            (granted,) = _numbers(group / limit, 1) or (None,)
            (used,) = _numbers(group / usage, 1) or (None,)
            if granted is not None and used is not None:
                cached = _statistic(group / "memory.stat", stat)
                left.append(max(0, granted - max(0, used - cached)))
    return min(left, default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The groups of this process that exist, from its own to the root, v2 and v1."""
    paths = {root, root / controller}
    with contextlib.suppress(OSError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            base = root if not controllers else root / controller
            if controllers and controller not in controllers.split(","):
                continue
            own = Path(path.lstrip("/"))
            paths |= {base / part for part in (own, *own.parents)}
    return (path for path in sorted(paths) if path.is_dir())


def _numbers(path: Path, count: int) -> tuple[int, ...] | None:
    """The integers a file holds; None when it is absent or says "max"."""
    with contextlib.suppress(OSError, ValueError):
        found = tuple(int(word) for word in path.read_text(encoding="ascii").split())
        return found if len(found) == count else None
    return None


def _statistic(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
