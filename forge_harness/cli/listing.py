"""`forge-harness list`: checks, suites, waivers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import (
    PROFILES,
    config_option,
    examples,
    existing,
    json_option,
    load,
    policy_in_force,
)
from forge_harness.cli.terminal import echo_json, several, table
from forge_harness.types import Severity

if TYPE_CHECKING:
    from forge_harness.config import LoadedConfig
    from forge_harness.policy import CatalogueEntry


@click.group("list", epilog=examples("forge-harness list checks --suite training"))
def list_group() -> None:
    """List checks, suites or waivers."""


@list_group.command(
    epilog=examples("forge-harness list checks", "forge-harness list checks --suite data --json")
)
@config_option
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Only this suite.")
@click.option("--profile", type=click.Choice(PROFILES), help="Only what is in this scope.")
@json_option
def checks(
    config_file: Path | None, suites: tuple[str, ...], profile: str | None, as_json: bool
) -> None:
    """List every check id of the catalogue, and how many tests it has.

    An id without a test is not measured, unless it is computed from the checks of a suite.
    """
    from forge_harness.cli.collect import collected_marks
    from forge_harness.selection import (
        inline_from,
        refuse_unknown,
        refuse_unread_names,
        with_inline,
    )

    loaded = load(config_file)
    marks = collected_marks(loaded.suite_paths())
    tests = Counter(mark["check"] for mark in marks if mark["problem"] is None)
    policy = with_inline(policy_in_force(loaded), inline_from(marks))
    refuse_unread_names(policy)
    refuse_unknown(policy, suites, ())
    wanted = [
        entry
        for entry in policy.catalogue
        if (not suites or entry.suite in suites) and (profile is None or profile in entry.profiles)
    ]
    if as_json:
        echo_json([_entry(entry, tests) for entry in wanted])
        return
    click.echo(_checks_table(wanted, tests))
    with_test = sum(1 for entry in wanted if tests[entry.id] or entry.measures_suite)
    click.echo(
        f"\n{several(len(wanted), 'check')}, {with_test} with a test. Policy {policy.digest}"
    )


def _entry(entry: CatalogueEntry, tests: Counter[str]) -> dict[str, Any]:
    return {
        **entry.model_dump(mode="json"),
        "collected": tests[entry.id] > 0,
        "tests": tests[entry.id],
    }


def _checks_table(entries: Sequence[CatalogueEntry], tests: Counter[str]) -> str:
    rows = [
        (
            entry.id,
            entry.severity,
            entry.component,
            "all" if len(entry.profiles) == len(PROFILES) else ",".join(entry.profiles),
            _shown_tests(entry, tests),
            entry.title,
        )
        for entry in entries
    ]
    return table(("check", "severity", "component", "profiles", "tests", "proves"), rows)


def _shown_tests(entry: CatalogueEntry, tests: Counter[str]) -> str:
    return "computed" if entry.measures_suite else str(tests[entry.id] or "none")


@list_group.command(epilog=examples("forge-harness list suites"))
@config_option
@json_option
def suites(config_file: Path | None, as_json: bool) -> None:
    """List the suites: weight, checks by severity."""
    policy = policy_in_force(load(config_file))
    counts = {
        name: Counter(e.severity.value for e in policy.catalogue if e.suite == name)
        for name in dict.fromkeys(entry.suite for entry in policy.catalogue)
    }
    weights = policy.suite_weights
    if as_json:
        echo_json([{"name": n, "weight": weights[n], "checks": c} for n, c in counts.items()])
        return
    order = tuple(severity.value for severity in Severity)
    rows = [(n, weights[n], c.total(), *(c[s] for s in order)) for n, c in counts.items()]
    click.echo(table(("suite", "weight", "checks", *order), rows))


@list_group.command(epilog=examples("forge-harness list waivers"))
@config_option
@json_option
def waivers(config_file: Path | None, as_json: bool) -> None:
    """List the waivers in force: check, owner, issue, expiry, and which have expired.

    One for a check that the catalogue does not have, the checks of your own included, excuses
    nothing: unknown.
    """
    from forge_harness.waivers import load_waivers

    loaded = load(config_file)
    file = loaded.path("run.waivers")
    existing(file, "Waiver file")
    today = datetime.now(UTC).date().isoformat()
    found = load_waivers(file) if file is not None else []
    unknown = _unknown({waiver.check for waiver in found}, loaded)
    rows = [
        {
            **waiver.model_dump(),
            "expired": waiver.expires < today,
            "unknown": waiver.check in unknown,
        }
        for waiver in found
    ]
    if as_json:
        echo_json(rows)
        return
    if not rows:
        click.echo("No waivers." if file else "No waiver file is configured (run.waivers).")
        return
    cells = [
        (
            r["check"],
            r["owner"],
            r["issue"],
            r["expires"],
            "unknown check" if r["unknown"] else "expired" if r["expired"] else "live",
            r["reason"],
        )
        for r in rows
    ]
    click.echo(table(("check", "owner", "issue", "expires", "state", "reason"), cells))


def _unknown(checks: set[str], loaded: LoadedConfig) -> set[str]:
    """Returns which of the check ids neither a catalogue nor a marker defines."""
    from forge_harness.cli.collect import collected_marks
    from forge_harness.selection import inline_from

    unknown = checks - policy_in_force(loaded).by_id.keys()
    paths = loaded.suite_paths()
    if not unknown or not paths:
        return unknown
    # Collecting imports all suites, which takes seconds.
    return unknown - {check.check for check in inline_from(collected_marks(paths))}
