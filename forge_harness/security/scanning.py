"""Every scan of a source tree and of the environment it runs in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from forge_harness.security import scan_installed, scan_sbom, scan_secrets, scan_static
from forge_harness.security.scan_types import Scan, State


def scan_all(
    root: Path, advisories: Path | None = None, bill: dict[str, Any] | None = None
) -> tuple[Scan, ...]:
    """Looks for advisories, licenses, secrets and unsafe code; lists what is installed.

    Args:
        root: Source tree, for secrets and static analysis.
        advisories: OSV file, archive or directory.
        bill: Bill of materials to judge; built when None.

    Raises:
        UsageError: `root` is not there.
    """
    return (
        scan_installed.scan_advisories(database=advisories),
        scan_static.scan(root),
        scan_secrets.scan(root),
        scan_installed.scan_licenses(),
        scan_sbom.scan(bill if bill is not None else scan_sbom.build()),
    )


def overall(scans: Iterable[Scan]) -> State:
    """Returns found when one found something, else not scanned when one could not look.

    No scan at all is not scanned.
    """
    states: Sequence[State] = [scan.state for scan in scans]
    if "found" in states:
        return "found"
    return "clean" if states and "not scanned" not in states else "not scanned"
