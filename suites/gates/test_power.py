"""The checks themselves are measured: defects are seeded, and the check that must see them runs."""

from __future__ import annotations

import json

import pytest

from forge_harness.drill.kills import Status, power_of
from forge_harness.drill.suites import Selection, run_suites

QUICK = (
    "quantizer",
    "forward",
    "model",
    "backward",
    "packing",
    "training loop",
    "data",
    "checkpoint",
    "configuration",
)
"""Stages whose checks take seconds; stores and servers are drilled in the larger profiles."""
SEEDS = {"quick": 1, "full": 2, "nightly": None}
"""Defects drawn of each stage, by the seed of the run; all in the nightly profile."""
OUT = (Status.KILLED, Status.NOT_MEASURED)


@pytest.mark.forge_check("gates.seeded_defects_found")
def test_seeded_defects_are_found(evidence, forge_profile, forge_seed, tmp_path):
    """The reference subject with one behaviour changed turns the check red that must see it.

    Fault injected: defects of real projects, each first shown to differ from the reference subject
    by what it does. Red counts where the check names what is wrong; a crash does not. Exact: one
    survivor is one too many, and so is one check that is red for the reference subject. Sound
    subjects of other kinds are drilled in the larger profiles.
    """
    quick = forge_profile == "quick"
    selection = Selection(
        stages=QUICK if quick else (), sample=SEEDS[forge_profile], variants=not quick
    )
    # One process at a time: the run's other checks have the other cores.
    report = run_suites(selection, seed=forge_seed, jobs=1)
    power = power_of("all", report.defects)
    unmeasured = _unmeasured(report)
    if unmeasured and not power.of:
        pytest.skip(unmeasured)
    interval = f"95 % interval {power.low:.3f} to {power.high:.3f}; the seeds are chosen, not drawn"
    evidence.at_least("seeded", power.of, limit=1, unit="defects", reason=interval)
    evidence.record("killed", power.killed, unit="defects", reason=_named(report, Status.KILLED))
    missed = [row for row in report.defects if row.status not in OUT]
    evidence.equal(
        "missed", len(missed), expected=0, unit="defects", reason=_first(missed) or "none survived"
    )
    evidence.equal(
        "false_alarms",
        report.alarms,
        expected=0,
        unit="checks",
        reason=f"of {report.measured_on_variants} over sound subjects{_accused(report)}",
    )
    matrix = tmp_path / "kills.json"
    matrix.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    evidence.artifact("kill_matrix", matrix, reason="each defect, its check, and what it said")
    if report.status == "not measured":
        pytest.skip(unmeasured)


def _unmeasured(report):
    """Says what could not be drilled: defects, and sound subjects that could not be run."""
    rows = [row for row in report.defects if row.status is Status.NOT_MEASURED]
    problems = [f"{kind.id}: {kind.problem}" for kind in report.variants if kind.problem]
    problems += [
        f"{check} is not measured for {kind.id}"
        for kind in report.variants
        for check, outcome in kind.outcomes.items()
        if outcome == "not_measured"
    ]
    return "; ".join([*filter(None, [_first(rows)]), *problems[:3]])


def _named(report, status):
    return ", ".join(row.id for row in report.defects if row.status is status) or "none"


def _first(rows):
    return "; ".join(f"{row.id} {row.status.value}: {row.reason}" for row in rows[:3])


def _accused(report):
    accused = [f"{check} for {kind.id}" for kind in report.variants for check in kind.alarms]
    return f"; {', '.join(accused[:3])}" if accused else ""
