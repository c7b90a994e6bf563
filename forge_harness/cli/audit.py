"""`forge-harness audit`: read and verify an audit log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import NamedPath, WholeNumber, examples, json_option
from forge_harness.cli.terminal import echo_json, say, several, table
from forge_harness.errors import AuditError, ExitCode, UsageError

if TYPE_CHECKING:
    from forge_harness.security.audit_heads import Head

_MOST = 2**63 - 1
"""Of records; SQLite counts no further."""
_path = click.argument("path", metavar="FILE", type=NamedPath())


@click.group(
    "audit",
    epilog=examples(
        "forge-harness audit tail audit.db",
        "forge-harness audit verify audit.db --keys keys.json",
    ),
)
def audit_group() -> None:
    """Read and verify the audit log: chained records, signed heads."""


@audit_group.command("tail", epilog=examples("forge-harness audit tail audit.db --count 50"))
@_path
@click.option(
    "--count",
    type=WholeNumber(1, _MOST),
    default=20,
    show_default=True,
    help="How many records.",
)
@json_option
def tail_command(path: Path, count: int, as_json: bool) -> int:
    """Show the newest records of FILE, oldest first."""
    from forge_harness.security.audit_file import AuditFile

    file = AuditFile(path, read_only=True)
    try:
        records = file.newest(count)
    finally:
        file.close()
    if as_json:
        echo_json([{"number": r.number, **asdict(r.event), "mac": r.mac.hex()} for r in records])
        return ExitCode.PASS
    rows = [
        (r.number, r.event.time, r.event.actor, r.event.action, r.event.decision, r.event.resource)
        for r in records
    ]
    click.echo(table(("number", "time", "actor", "action", "decision", "resource"), rows))
    return ExitCode.PASS


@audit_group.command(
    "verify",
    epilog=examples(
        "forge-harness audit verify audit.db --keys keys.json",
        "forge-harness audit verify audit.db --keys keys.json --newest head-kept-elsewhere.json",
    ),
)
@_path
@click.option(
    "--keys", required=True, metavar="SOURCE", help="Keyring: FILE, env:NAME, command:..."
)
@click.option(
    "--heads",
    type=NamedPath(dir_okay=False),
    help="Signed heads (FILE.heads).",
)
@click.option(
    "--newest",
    type=NamedPath(exists=True, dir_okay=False),
    help="A head kept elsewhere: the last line of the file of heads, as it was.",
)
@json_option
def verify_command(
    path: Path, keys: str, heads: Path | None, newest: Path | None, as_json: bool
) -> int:
    """Recompute the chain of FILE and hold it against its signed heads; exit code 8 if it fails."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from forge_harness.security.audit import verify
    from forge_harness.security.key_sources import load_keyring
    from forge_harness.security.keys import Purpose

    keyring = load_keyring(keys)
    seeds = keyring.usable_keys(Purpose.SIGN)
    report = verify(
        path,
        keys=keyring.usable_keys(Purpose.AUDIT),
        public_keys=[Ed25519PrivateKey.from_private_bytes(s).public_key() for s in seeds],
        heads=heads,
        newest=None if newest is None else _head_in(newest),
    )
    if as_json:
        echo_json(asdict(report))
    else:
        for problem in report.problems:
            say(problem)
        state = "does not verify" if report.problems else "verifies"
        click.echo(
            f"{path} {state}: {several(report.records, 'record')}, "
            f"{several(report.heads, 'signed head')}, covered to record {report.covered}."
        )
        if (open_end := report.records - report.covered) > 0:
            say(
                f"{_newest(open_end)} covered by no head: more of them could have been cut off "
                "without a trace."
            )
    return ExitCode.VERIFICATION_FAILED if report.problems else ExitCode.PASS


def _head_in(path: Path) -> Head:
    from forge_harness.durable import read_plain
    from forge_harness.security.audit_heads import parse_head

    try:
        return parse_head(read_plain(path).strip())
    except (AuditError, OSError) as error:
        raise UsageError(
            f"--newest {path} holds no signed head; expected a line of the file of heads, as it "
            "was kept."
        ) from error


def _newest(count: int) -> str:
    return "The newest record is" if count == 1 else f"The newest {count} records are"
