"""What changed against a baseline run."""

from __future__ import annotations

from forge_harness.integration.baselines import AcceptedRun
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import Change, Changes
from forge_harness.report.text import clean
from forge_harness.types import Outcome

BAD = frozenset({Outcome.FAIL, Outcome.ERROR, Outcome.XPASS})
GOOD = frozenset({Outcome.PASS, Outcome.WARN, Outcome.FLAKY})


def changes_since(record: RunRecord, policy: Policy, baseline: AcceptedRun | None) -> Changes:
    """Returns the checks that changed sides since the baseline, in catalogue order.

    Checks of another version have another meaning and do not compare. Values are compared only
    between runs of one machine class, policy, subject and profile.
    """
    if baseline is None:
        return Changes(baseline=None, refusal="")
    from forge_harness.integration.quality_coordinator import QualityCoordinator

    coordinator = QualityCoordinator(policy)
    if isinstance(baseline, RunRecord):
        baseline = coordinator.baseline_of(baseline)
    compared = coordinator.compare_baseline(record, baseline)
    before = {(name, check.version): check.outcome for name, check in baseline.checks.items()}
    pairs = [
        Change(
            check=check.id,
            anchor=check_anchor(check.id),
            before=before[check.id, check.version],
            after=check.outcome,
        )
        for check in record.checks
        if (check.id, check.version) in before
    ]
    missing = Outcome.NOT_MEASURED
    return Changes(
        baseline=clean(baseline.run_id),
        refusal=clean(compared.reason),
        newly_failing=tuple(p for p in pairs if p.after in BAD and p.before not in BAD),
        fixed=tuple(p for p in pairs if p.before in BAD and p.after in GOOD),
        newly_not_measured=tuple(
            p for p in pairs if p.after is missing and p.before is not missing
        ),
        regressions=tuple(clean(row.reason) for row in compared.regressions),
    )
