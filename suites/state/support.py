"""What the checks of this suite share: one campaign against the subject's store, as evidence.

A campaign that cannot run here is skipped with its reason, and so reported as not measured.
"""

from __future__ import annotations

from typing import Any

import pytest

from forge_harness.drill.storage import run_campaign
from forge_harness.drill.tally import CampaignReport, Status

FULL_TRIALS = {"kill": 100, "errors": 100, "migration": 60}
"""Campaign -> trials of the full profile, where every point takes a process under strace: a third
of a second each. The nightly profile tries every point."""


def campaign(
    name: str, subject: Any, evidence: Any, *, profile: str, seed: int, trials: int | None = None
) -> CampaignReport:
    """Runs a campaign, records its counts, and fails at the first that is not zero."""
    store = subject.state_store()
    if trials is None and profile == "full":
        trials = FULL_TRIALS.get(name)
    report = run_campaign(
        name,
        store.opener,
        seed=seed,
        profile=profile,
        trials=trials,
        old_stores=store.old_stores,
    )
    if report.status is Status.NOT_MEASURED:
        pytest.skip(f"campaign {name}: {report.reason}")
    record(report, evidence)
    return report


def record(report: CampaignReport, evidence: Any) -> None:
    """Records what a campaign counted, each loss with a limit of zero."""
    name = report.name
    evidence.record(f"{name}_trials", report.trials, unit="trials", reason=f"seed {report.seed}")
    if report.points:
        tried = f"{report.points_tried} of {report.points} points tried"
        evidence.record(f"{name}_points", report.points, unit="points", reason=tried)
    counts = {
        f"{name}_acknowledged": report.acknowledged,
        f"{name}_in_doubt": report.in_doubt,
        f"{name}_orphans": report.orphans,
    }
    for what, count in counts.items() if report.acknowledged else ():
        evidence.record(what, count, reason="over all trials")
    if report.recovery_max_s is not None:
        evidence.record(
            f"{name}_recovery_max", report.recovery_max_s, unit="s", reason="first open after it"
        )
    losses = {
        f"{name}_lost": report.lost,
        f"{name}_torn": report.torn,
        f"{name}_silent": report.silent,
        f"{name}_unrecoverable": report.unrecoverable,
    }
    for what, count in losses.items():
        evidence.equal(
            what,
            count,
            expected=0,
            unit="trials",
            reason=report.reason or "every state compared with what was committed",
        )
