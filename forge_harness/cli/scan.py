"""`forge-harness scan`: advisories, unsafe code, secrets, licenses, bill of materials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.github import not_obeyed
from forge_harness.cli.options import NamedPath, examples, existing, json_option
from forge_harness.cli.terminal import echo_json
from forge_harness.errors import ExitCode

if TYPE_CHECKING:
    from forge_harness.security.scan_types import Scan

_SHOWN = 20


@click.command(
    "scan",
    epilog=examples(
        "forge-harness scan",
        "forge-harness scan src --advisories advisory-database/vulns --sbom bom.json",
    )
    + "\n\n\b\nExit codes: 0 all clean, 1 something found, 7 something not scanned.",
)
@click.argument("root", metavar="[PATH]", type=NamedPath(), required=False, default=Path())
@click.option(
    "--advisories",
    metavar="DIR",
    type=NamedPath(),
    help="OSV records: a directory, JSON list or archive (default: pip-audit, if it answers).",
)
@click.option(
    "--sbom",
    metavar="FILE",
    type=NamedPath(),
    help="Write what is installed as CycloneDX JSON.",
)
@json_option
def scan_command(root: Path, advisories: Path | None, sbom: Path | None, as_json: bool) -> int:
    """Scan the source in PATH (default: here) and the environment; three answers each.

    Clean, found, or not scanned. Each scanner is given a canary in the same run; one that does not
    find it scanned nothing, and is never clean.
    """
    from forge_harness.security import scan_sbom
    from forge_harness.security.scanning import overall, scan_all

    existing(advisories, "The advisory database")
    bill = scan_sbom.build()
    scans = scan_all(root, advisories, bill)
    if sbom is not None:
        _write(sbom, bill)
    state = overall(scans)
    if as_json:
        echo_json({"path": str(root), "state": state, "scans": [s.as_json() for s in scans]})
    else:
        for scan in scans:
            click.echo("\n".join(map(not_obeyed, _lines(scan))))
    return {"clean": ExitCode.PASS, "found": ExitCode.GATE_FAILED}.get(state, ExitCode.INCOMPLETE)


def _write(path: Path, bill: dict[str, object]) -> None:
    import json

    from forge_harness.durable import write_durably
    from forge_harness.errors import UsageError

    try:
        write_durably(path, (json.dumps(bill, indent=2) + "\n").encode())
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror or error}.") from error


def _lines(scan: Scan) -> list[str]:
    if scan.state == "not scanned":
        return [f"{scan.name}: NOT SCANNED ({scan.tool}): {scan.why_not}"]
    found = f"{len(scan.findings)} found" if scan.findings else "clean"
    lines = [
        f"{scan.name}: {found} in {scan.scanned} ({scan.tool}, {scan.version}; "
        f"canary found: {scan.canary})"
    ]
    lines += [f"  {finding.sentence()}" for finding in scan.findings[:_SHOWN]]
    if len(scan.findings) > _SHOWN:
        lines.append(f"  and {len(scan.findings) - _SHOWN} more (--json lists all)")
    return lines + [f"  note: {note}" for note in scan.notes]
