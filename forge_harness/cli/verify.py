"""`forge-harness verify`: recompute everything a run claims, or hold a package to a signature."""

from __future__ import annotations

import json
from pathlib import Path

import click

from forge_harness.cli.options import examples, json_option, open_run, run_dir_argument
from forge_harness.cli.summary import score_sentence
from forge_harness.cli.terminal import echo_json
from forge_harness.errors import ExitCode, RunDirectoryError, UsageError
from forge_harness.record import RunRecord

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
    if as_json:
        fields = ("file", "what", "expected", "found")
        rows = [{name: getattr(p, name) for name in fields} for p in problems]
        echo_json({"directory": str(directory), "verified": not problems, "problems": rows})
    elif problems:
        for problem in problems[:_SHOWN]:
            click.echo(problem.sentence(), err=True)
        if len(problems) > _SHOWN:
            click.echo(f"and {len(problems) - _SHOWN} more (--json lists all)", err=True)
        count = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
        click.echo(f"{directory} does not verify: {count}.", err=True)
    else:
        _praise(directory, open_run(directory)[0])
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
        click.echo(f"{directory} is what was signed: {found.files} files, signed by {by}.")
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


_OURS = ("run.json", "manifest.json", "policy.json")


def _praise(directory: Path, record: RunRecord) -> None:
    click.echo(f"{directory} verifies. Recomputed:")
    for line in (*_recomputed(directory, record), score_sentence(record)):
        click.echo(f"  {line}")
    click.echo(f"  verdict {record.verdict}, policy {record.policy_digest}")


def _recomputed(directory: Path, record: RunRecord) -> list[str]:
    files = _manifest_files(directory)
    evidence = [e for check in record.checks for e in check.evidence]
    items = sum(len(check.items) for check in record.checks) + len(record.unscored_items)
    artifacts = {e.artifact for e in evidence if e.artifact}
    return [
        f"{files} files: size and sha256 against the manifest",
        f"{len(artifacts)} artifacts: content against the name",
        f"{len(evidence)} values against their limits, {items} test items",
        f"{len(record.checks)} checks rolled up, {len(record.suites)} suites scored",
    ]


def _manifest_files(directory: Path) -> int:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{directory / 'manifest.json'} vanished: {error}.") from error
    return len(manifest["files"])
