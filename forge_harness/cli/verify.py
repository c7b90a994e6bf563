"""`forge-harness verify`: recompute everything a run claims, or hold a package to a signature."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.directory_lock import unwritten
from forge_harness.cli.github import not_obeyed
from forge_harness.cli.options import (
    NamedPath,
    WholeNumber,
    examples,
    json_option,
    open_run,
    run_dir_argument,
)
from forge_harness.cli.pages import rendered_again, unverified_lines
from forge_harness.cli.summary import score_sentence
from forge_harness.cli.terminal import echo_json, printable
from forge_harness.errors import ExitCode, RunDirectoryError, UsageError, several
from forge_harness.record import RunRecord

if TYPE_CHECKING:
    from forge_harness.report.provenance import RenderedAgain
    from forge_harness.scoring import Discrepancy

_SHOWN = 20
_NAMED = 5


@click.command(
    "verify",
    epilog=examples(
        "forge-harness verify first",
        "forge-harness verify packages/digits --key digits.pem",
    ),
)
@run_dir_argument
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=NamedPath(exists=True, dir_okay=False),
    metavar="PEM",
    help="Pinned public key: DIR is a package signed by `forge-harness sign` (repeatable).",
)
@click.option(
    "--signature",
    type=NamedPath(),
    metavar="FILE",
    help="Of the package (default: DIR.dsse.json).",
)
@click.option(
    "--threshold",
    type=WholeNumber(min=1),
    default=1,
    show_default=True,
    help="How many different pinned keys must have signed.",
)
@json_option
def verify_command(
    directory: Path, keys: tuple[Path, ...], signature: Path | None, threshold: int, as_json: bool
) -> int:
    """Recompute every digest, outcome, score and verdict of the run in DIR, offline.

    Its reports are rendered again and must have the same bytes. With --key, DIR is a package, and
    every file of it is held against its signature. Exits 8 naming each difference, 7 where all
    holds but a report that another release made, which renders other bytes here, 0 with what was
    recomputed.
    """
    if keys:
        return _verify_package(directory, keys, signature, threshold, as_json)
    if signature is not None or threshold != 1:
        raise UsageError("--signature and --threshold go with --key: pin the public key.")
    from forge_harness.scoring import verify_run

    if _is_package(directory):
        raise UsageError(
            f"{directory} is a package, not a run; give --key PEM, the pinned public key of who "
            "signed it, to hold it against its signature."
        )
    if not directory.is_dir() or not any((directory / n).exists() for n in _OURS):
        open_run(directory)  # refuses with the sentence for what is wrong
    with unwritten(directory):
        problems = verify_run(directory)
        checked = None if problems else _checked(directory)
    problems += [] if checked is None else checked.reports.problems
    code = _code(problems, checked)
    if as_json:
        fields = ("file", "what", "expected", "found")
        rows = [{name: getattr(p, name) for name in fields} for p in problems]
        echo_json(
            {
                "directory": str(directory),
                "verified": code is ExitCode.PASS,
                "problems": rows,
                "reports": {} if checked is None else _told(checked.reports),
                "given": {} if checked is None else checked.reports.leaning,
                "manifest_only": [] if checked is None else checked.manifest_only,
            }
        )
    elif checked is None or problems:
        for problem in problems[:_SHOWN]:
            click.echo(not_obeyed(problem.sentence()), err=True)
        if len(problems) > _SHOWN:
            click.echo(f"and {len(problems) - _SHOWN} more (--json lists all)", err=True)
        click.echo(
            f"{directory} does not verify: {several(len(problems), 'difference')}.", err=True
        )
    else:
        _praise(directory, checked)
        if code is not ExitCode.PASS:
            click.echo(f"Exit code {int(code)}: incomplete: a report is not verified.")
    return code


def _verify_package(
    directory: Path, keys: tuple[Path, ...], signature: Path | None, threshold: int, as_json: bool
) -> int:
    from forge_harness.security.dsse import public_key_from_pem
    from forge_harness.security.signing import verify_package

    pinned = [public_key_from_pem(key.read_bytes()) for key in keys]
    found = verify_package(directory, pinned, signature=signature, threshold=threshold)
    if as_json:
        signers = list(found.signers)
        echo_json({"directory": str(directory), "verified": True, "signers": signers})
    else:
        by = ", ".join(signer[:16] for signer in found.signers)
        click.echo(
            f"{directory} is what was signed: {several(found.files, 'file')}, signed by {by}."
        )
    return ExitCode.PASS


def _is_package(directory: Path) -> bool:
    """Whether the only thing here that a run has as well is the manifest of a package."""
    if any((directory / name).exists() for name in ("run.json", "policy.json")):
        return False
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "schema" in manifest and "schema_version" not in manifest


REPORTS = "reports.json"
_OURS = ("run.json", "manifest.json", "policy.json")


@dataclass(frozen=True, slots=True)
class _Checked:
    """A run whose record holds, and what of the directory the record speaks for."""

    record: RunRecord
    reports: RenderedAgain
    manifest_only: list[str]
    """Files for which nothing but the manifest speaks."""


def _checked(directory: Path) -> _Checked:
    from forge_harness.report.write import WRITERS
    from forge_harness.scoring import only_in_manifest

    record, policy = open_run(directory)
    rendered = {REPORTS, *(file for file, _ in WRITERS.values())}
    others = [name for name in only_in_manifest(directory, record) if name not in rendered]
    return _Checked(record, rendered_again(directory, record, policy), others)


def _code(problems: list[Discrepancy], checked: _Checked | None) -> ExitCode:
    if problems:
        return ExitCode.VERIFICATION_FAILED
    # What cannot be verified is never green.
    is_open = checked is not None and bool(checked.reports.unknown)
    return ExitCode.INCOMPLETE if is_open else ExitCode.PASS


def _told(reports: RenderedAgain) -> dict[str, str]:
    """Returns report file -> whether it is what the record gives."""
    told = dict.fromkeys(reports.same, "rendered again")
    told |= {file: f"not verified: {why}" for file, why in reports.unknown.items()}
    return told | {problem.file: problem.what for problem in reports.problems}


def _praise(directory: Path, checked: _Checked) -> None:
    record, reports = checked.record, checked.reports
    but = f"but for {several(len(reports.unknown), 'report')}" if reports.unknown else ""
    click.echo(f"{directory} verifies{but and ' ' + but}. Recomputed:")
    for line in (*_recomputed(directory, record), score_sentence(record)):
        click.echo(f"  {line}")
    click.echo(f"  verdict {record.verdict}, policy {record.policy_digest}")
    if reports.same:
        click.echo(f"  {', '.join(reports.same)}: rendered again, byte for byte")
    # Of other runs this directory holds what its reports were given, not where that came from.
    for others in dict.fromkeys(reports.leaning.values()):
        files = ", ".join(file for file, said in reports.leaning.items() if said == others)
        click.echo(f"  with {printable(others)} as {REPORTS} has them: {files}")
    if checked.manifest_only:
        count = several(len(checked.manifest_only), "file")
        names = ", ".join(map(printable, checked.manifest_only[:_NAMED]))
        more = ", ..." if len(checked.manifest_only) > _NAMED else ""
        held = "Held against the manifest only, which anybody can write anew"
        click.echo(f"{held}: {count} ({names}{more}).")
    for line in unverified_lines(directory, reports):
        click.echo(line)


def _recomputed(directory: Path, record: RunRecord) -> list[str]:
    files = _manifest_files(directory)
    evidence = [e for check in record.checks for e in check.evidence]
    items = sum(len(check.items) for check in record.checks) + len(record.unscored_items)
    artifacts = {e.artifact for e in evidence if e.artifact}
    left = len(record.files or ())
    return [
        f"{several(files, 'file')}: size and sha256 against the manifest",
        f"{several(len(artifacts), 'artifact')}: content against the name",
        *([f"{several(left, 'file')} of study and logs: sha256 against run.json"] if left else []),
        f"{several(len(evidence), 'value')} against their limits, {several(items, 'test item')}",
        f"{several(len(record.checks), 'check')} rolled up, "
        f"{several(len(record.suites), 'suite')} scored",
    ]


def _manifest_files(directory: Path) -> int:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{directory / 'manifest.json'} vanished: {error}.") from error
    return len(manifest["files"])
