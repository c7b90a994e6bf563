"""`forge-harness verify`: recompute everything a run claims, or hold a package to a signature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import examples, json_option, open_run, run_dir_argument
from forge_harness.cli.summary import score_sentence
from forge_harness.cli.terminal import echo_json, printable, several
from forge_harness.errors import ExitCode, RunDirectoryError, UsageError
from forge_harness.record import RunRecord

if TYPE_CHECKING:
    from forge_harness.report.provenance import RenderedAgain

_SHOWN = 20


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
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="PEM",
    help="Pinned public key: DIR is a package signed by `forge-harness sign` (repeatable).",
)
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of the package (default: DIR.dsse.json).",
)
@click.option(
    "--threshold",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many different pinned keys must have signed.",
)
@json_option
def verify_command(
    directory: Path, keys: tuple[Path, ...], signature: Path | None, threshold: int, as_json: bool
) -> int:
    """Recompute every digest, outcome, score and verdict of the run in DIR, offline.

    Its reports are rendered again and must have the same bytes, where this release made them.
    With --key, DIR is a package, and every file of it is held against its signature. Exits 8 naming
    each difference, 0 with what was recomputed.
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
    problems = verify_run(directory)
    reports = _rendered_again(directory) if not problems else None
    problems += reports.problems if reports is not None else []
    if as_json:
        fields = ("file", "what", "expected", "found")
        rows = [{name: getattr(p, name) for name in fields} for p in problems]
        echo_json(
            {
                "directory": str(directory),
                "verified": not problems,
                "problems": rows,
                "reports": _told(reports),
                "given": {} if reports is None else reports.leaning,
            }
        )
    elif problems:
        for problem in problems[:_SHOWN]:
            click.echo(problem.sentence(), err=True)
        if len(problems) > _SHOWN:
            click.echo(f"and {len(problems) - _SHOWN} more (--json lists all)", err=True)
        click.echo(
            f"{directory} does not verify: {several(len(problems), 'difference')}.", err=True
        )
    else:
        _praise(directory, open_run(directory)[0], reports)
    return ExitCode.VERIFICATION_FAILED if problems else ExitCode.PASS


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


def _rendered_again(directory: Path) -> RenderedAgain:
    """Holds the pages people look at against the record, which is what was recomputed so far."""
    from forge_harness.report.provenance import render_again

    record, policy = open_run(directory)
    return render_again(directory, record, policy)


def _told(reports: RenderedAgain | None) -> dict[str, str]:
    """Returns report file -> whether it is what the record gives."""
    if reports is None:
        return {}
    told = dict.fromkeys(reports.same, "rendered again")
    told |= {file: f"not rendered again: {why}" for file, why in reports.unknown.items()}
    return told | {problem.file: problem.what for problem in reports.problems}


def _praise(directory: Path, record: RunRecord, reports: RenderedAgain | None) -> None:
    click.echo(f"{directory} verifies. Recomputed:")
    for line in (*_recomputed(directory, record), score_sentence(record)):
        click.echo(f"  {line}")
    click.echo(f"  verdict {record.verdict}, policy {record.policy_digest}")
    if reports is None:
        return
    if reports.same:
        click.echo(f"  {', '.join(reports.same)}: rendered again, byte for byte")
    # Of other runs this directory holds what its reports were given, not where that came from.
    for others in dict.fromkeys(reports.leaning.values()):
        files = ", ".join(file for file, said in reports.leaning.items() if said == others)
        click.echo(f"  with {printable(others)} as {REPORTS} has them: {files}")
    for file, why in reports.unknown.items():
        click.echo(
            f"Not rendered again: {file}, {printable(why)}. `forge-harness report {directory}` "
            "makes it anew."
        )


def _recomputed(directory: Path, record: RunRecord) -> list[str]:
    files = _manifest_files(directory)
    evidence = [e for check in record.checks for e in check.evidence]
    items = sum(len(check.items) for check in record.checks) + len(record.unscored_items)
    artifacts = {e.artifact for e in evidence if e.artifact}
    return [
        f"{several(files, 'file')}: size and sha256 against the manifest",
        f"{several(len(artifacts), 'artifact')}: content against the name",
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
