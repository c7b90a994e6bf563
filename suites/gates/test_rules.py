"""Severities, waivers and baselines, against expectations written down from forge-score/1."""

from __future__ import annotations

import datetime

import pytest

from forge_harness.record import Waiver

# severity, outcome of one check among 40 critical passes -> verdict, ceiling of both ends
CONSEQUENCES = (
    ("critical", "pass", "PASS", 100),
    ("critical", "flaky", "FAIL", 100),
    ("critical", "warn", "FAIL", 49),
    ("critical", "fail", "FAIL", 49),
    ("critical", "error", "FAIL", 49),
    ("critical", "not_measured", "INCOMPLETE", 79),
    ("high", "flaky", "PASS_WITH_WARNINGS", 100),
    ("high", "warn", "FAIL", 79),
    ("high", "fail", "FAIL", 79),
    ("high", "error", "FAIL", 79),
    ("high", "not_measured", "INCOMPLETE", 100),
    ("medium", "warn", "PASS_WITH_WARNINGS", 100),
    ("medium", "fail", "PASS_WITH_WARNINGS", 100),
    ("medium", "error", "PASS_WITH_WARNINGS", 100),
    ("medium", "not_measured", "PASS_WITH_WARNINGS", 100),
    ("low", "fail", "PASS_WITH_WARNINGS", 100),
)
# One suite, one check a severity, weights 8 + 4 + 2 + 1 = 15: the low score when one of them
# fails. 13/15 is 86.67 and 14/15 is 93.33; a score is never rounded up.
SCORE_WITHOUT = {"critical": 46, "high": 73, "medium": 86, "low": 93}
# Two items of one check -> (low, high) credit, by severity.
ROLL_UPS = (
    ("critical", ("pass", "fail"), ("0", "0")),
    ("high", ("pass", "flaky"), ("1/2", "1/2")),
    ("high", ("pass", "not_measured"), ("0", "1")),
    ("medium", ("pass", "fail"), ("1/2", "1/2")),
    ("medium", ("warn", "pass"), ("3/4", "3/4")),
    ("low", ("pass", "not_measured"), ("1/2", "1")),
    ("low", ("fail", "not_measured"), ("0", "1/2")),
)


@pytest.mark.forge_check("gates.severity_policy")
def test_severities_block_cap_and_roll_up(quality_coordinator, trial, wrong, evidence):
    """Verdict, ceiling, score and credits of hand-computed runs."""
    for severity, outcome, verdict, ceiling in CONSEQUENCES:
        record = among_good_ones(quality_coordinator, trial, severity, outcome)
        what = f"one {severity} check ended as {outcome}"
        wrong.expect(f"verdict, {what}", str(record.verdict), verdict)
        wrong.expect(f"within {ceiling}, {what}", record.score.high <= ceiling, True)
        if ceiling < 100:
            wrong.expect(f"low score, {what}", record.score.low, ceiling)
    for severity, low in SCORE_WITHOUT.items():
        wrong.expect(
            f"score without {severity}", one_of_each(quality_coordinator, trial, severity), low
        )
    for severity, outcomes, credits in ROLL_UPS:
        coordinator = quality_coordinator(trial.policy(("trial.x", severity)))
        items = [trial.item("trial.x", outcome, number=i) for i, outcome in enumerate(outcomes)]
        for order in (items, items[::-1]):
            check = coordinator.assemble(order, context=trial.context()).checks[0]
            found = (check.credit_low, check.credit_high)
            wrong.expect(f"{severity} check of {outcomes}", found, credits)
    wrong.settle(evidence, "forge-score/1: weights 8, 4, 2, 1; caps 49 and 79; floored")


def among_good_ones(quality_coordinator, trial, severity, outcome):
    """A run of 40 critical passes and one check of that severity and outcome."""
    others = [f"trial.c{i}" for i in range(40)]
    checks = [*((name, "critical") for name in others), ("trial.x", severity)]
    items = [*(trial.item(name) for name in others), trial.item("trial.x", outcome)]
    return quality_coordinator(trial.policy(*checks)).assemble(items, context=trial.context())


def one_of_each(quality_coordinator, trial, failing):
    """Low score of a suite with one check a severity, one of them failing."""
    checks = [(f"trial.{severity}", severity) for severity in SCORE_WITHOUT]
    items = [trial.item(name, "fail" if s == failing else "pass") for name, s in checks]
    record = quality_coordinator(trial.policy(*checks)).assemble(items, context=trial.context())
    return record.score.low


DAY = datetime.timedelta(days=1)


@pytest.mark.forge_check("gates.waiver_expiry")
def test_waivers_end(quality_coordinator, trial, wrong, evidence):
    """Waivers that end yesterday, today and tomorrow, needed and not, at each severity."""
    today = datetime.date.fromisoformat(trial.context().started_at[:10])
    expectations = (
        # outcome, last day of the waiver -> outcome of the check
        ("fail", today + DAY, "xfail"),
        ("fail", today, "xfail"),
        ("fail", today - DAY, "fail"),
        ("fail", today - 400 * DAY, "fail"),
        ("error", today + DAY, "xfail"),
        ("pass", today + DAY, "xpass"),
        ("pass", today - DAY, "xpass"),
        ("not_measured", today + DAY, "not_measured"),
    )
    for severity in ("critical", "high", "medium", "low"):
        for outcome, expires, expected in expectations:
            record = waived(quality_coordinator, trial, severity, outcome, expires)
            check = record.checks[-1]
            what = f"{severity} {outcome}, waived until {expires}, on {today}"
            wrong.expect(what, str(check.outcome), expected)
            wrong.expect(f"{what}: credit", check.credit_low, "0")
            blocks = expected == "xpass" or (
                expected == "fail" and severity in ("critical", "high")
            )
            wrong.expect(f"{what}: blocks", record.verdict == "FAIL", blocks)
            if expected == "fail":
                wrong.expect(f"{what}: says why", str(expires) in check.reason, True)
    stray = waived(quality_coordinator, trial, "low", "pass", today + DAY, check="trial.typo")
    wrong.expect("a waiver of no check", any("typo" in r for r in stray.verdict_reasons), True)
    wrong.settle(evidence, "a waiver has an owner and a last day, and goes when it is not needed")


def waived(quality_coordinator, trial, severity, outcome, expires, *, check="trial.x"):
    """A run of 40 critical passes and one check under a waiver."""
    others = [f"trial.c{i}" for i in range(40)]
    checks = [*((name, "critical") for name in others), ("trial.x", severity)]
    waiver = Waiver(
        check=check, owner="owner", reason="known", issue="#1", expires=expires.isoformat()
    )
    items = [*(trial.item(name) for name in others), trial.item("trial.x", outcome)]
    coordinator = quality_coordinator(trial.policy(*checks), [waiver])
    return coordinator.assemble(items, context=trial.context())


@pytest.mark.forge_check("gates.baseline_regression")
def test_regressions_against_a_baseline(quality_coordinator, policy, gates, trial, wrong, evidence):
    """Each gate beyond and within its tolerance, and better; runs that must not be compared.

    Times of two runs differ by more than a tolerance worth having: they are never regressions.
    """
    tolerance = policy.threshold("baseline.gate_worsening.at_most")
    checks = [(f"gates.{gate.name}", "medium") for gate in gates]
    trial_policy = trial.policy(*checks, like=policy)

    def run(changed=None, value=None, **context):
        items = [
            trial.gate_item(
                gate, value if gate.name == changed else baseline_value(gate, tolerance)
            )
            for gate in gates
        ]
        coordinator = quality_coordinator(trial_policy)
        return coordinator.assemble(items, context=trial.context(**context))

    accepted = run()
    coordinator = quality_coordinator(trial_policy, baseline=accepted)
    wrong.expect("regressions of an equal run", regressions(coordinator, run()), set())
    for gate in gates:
        base = baseline_value(gate, tolerance)
        side = -1 if gate.direction == "at_least" else 1
        judged = set() if gate.unit == "s" else {gate.name}
        shares = ((tolerance + 0.01, judged), (tolerance / 2, set()), (-0.03, set()))
        for share, expected in shares:
            changed = run(gate.name, base + side * share * abs(base))
            what = f"{gate.name} worse by {share:.3f}, still within its limit"
            wrong.expect(what, regressions(coordinator, changed), expected)
            failed = coordinator.verdict(changed).verdict == "FAIL"
            wrong.expect(f"verdict FAIL, {what}", failed, bool(expected))
    strangers = {
        "another machine class": {**trial.context().environment, "cpu": "another"},
        "an unnamed machine": {},
    }
    for what, environment in strangers.items():
        comparison = coordinator.compare_baseline(run(environment=environment))
        wrong.expect(f"comparable with {what}", comparison.comparable, False)
        verdict = str(coordinator.verdict(run(environment=environment)).verdict)
        wrong.expect(f"verdict on {what}", verdict, "INCOMPLETE")
    wrong.settle(
        evidence, f"{tolerance:.0%} to the wrong side of the baseline, on one machine class"
    )


def baseline_value(gate, tolerance):
    """A value so far on the good side that a regression does not reach the limit itself."""
    return gate.better(2 * (tolerance + 0.01))


def regressions(coordinator, record):
    """Names of what got worse."""
    return {row.gate for row in coordinator.compare_baseline(record).regressions}
