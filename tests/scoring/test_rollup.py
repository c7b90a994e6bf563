"""Evidence rules, roll-up by severity, waivers."""

from fractions import Fraction

import pytest

from forge_harness.scoring.rollup import roll_up, settle, unique
from forge_harness.types import Outcome, Severity

HALF = Fraction(1, 2)
TODAY = "2026-06-15"


def rolled(make, severity, *items, waivers=(), ruled_out=None):
    entry = make.policy(("s.a", severity)).catalogue[0]
    return roll_up(entry, items, ruled_out=ruled_out, waivers=waivers, today=TODAY)


@pytest.mark.parametrize("outcome", ["pass", "warn", "flaky"])
def test_what_left_no_evidence_is_not_measured(make, outcome):
    item = settle(make.item("s.a", outcome, evidence=0), Severity.LOW)
    assert (item.outcome, item.reason) == (
        Outcome.NOT_MEASURED,
        "passed without recording evidence",
    )


@pytest.mark.parametrize(
    ("severity", "level", "expected"),
    [
        ("critical", "fail", "fail"),
        ("critical", "warn", "fail"),
        ("high", "warn", "fail"),
        ("medium", "warn", "warn"),
        ("low", "warn", "warn"),
        ("low", "fail", "fail"),
    ],
)
def test_a_missed_limit_decides_whatever_pytest_said(make, severity, level, expected):
    missed = make.evidence("x", "loss", 2.0, limit=1.0, direction="at_most", level=level)
    item = settle(make.item("s.a", evidence=[missed]), Severity(severity))
    assert item.outcome == expected
    assert item.reason == "loss is 2, over its limit of 1"


def test_a_non_finite_record_fails(make):
    item = settle(make.item("s.a", evidence=[make.evidence("x", "loss", "nan")]), Severity.LOW)
    assert item.outcome is Outcome.FAIL


@pytest.mark.parametrize("outcome", ["xfail", "xpass"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("known", "known"), ("", "expected to fail by its own marker; only a waiver excuses")],
)
def test_no_item_excuses_itself(make, outcome, given, kept):
    item = settle(make.item("s.a", outcome, reason=given), Severity.LOW)
    assert (item.outcome, item.reason) == (Outcome.FAIL, kept)


@pytest.mark.parametrize(
    ("given", "kept"), [("slower", "slower"), ("", "a warning fails a critical check")]
)
def test_a_warning_that_fails_says_why(make, given, kept):
    item = settle(make.item("s.a", "warn", reason=given), Severity.CRITICAL)
    assert (item.outcome, item.reason) == (Outcome.FAIL, kept)


def test_a_recorded_failure_is_never_made_better(make):
    item = settle(make.item("s.a", "fail", reason="assert 1 == 2"), Severity.LOW)
    assert (item.outcome, item.reason) == (Outcome.FAIL, "assert 1 == 2")


def test_a_missed_warning_does_not_soften_a_failure(make):
    missed = make.evidence("x", "loss", 2.0, limit=1.0, direction="at_most", level="warn")
    item = settle(make.item("s.a", "fail", evidence=[missed]), Severity.LOW)
    assert (item.outcome, item.reason) == (Outcome.FAIL, "why fail")


def test_a_retry_makes_a_pass_flaky(make):
    assert settle(make.item("s.a", attempts=2), Severity.LOW).outcome is Outcome.FLAKY


@pytest.mark.parametrize("severity", ["critical", "high"])
def test_a_warning_fails_a_severe_check(make, severity):
    assert settle(make.item("s.a", "warn"), Severity(severity)).outcome is Outcome.FAIL


def test_only_the_catalogue_rules_a_check_out(make):
    say_so = make.item("s.a", "not_applicable")
    assert rolled(make, "low", say_so).outcome is Outcome.NOT_MEASURED
    by_predicate = rolled(make, "low", say_so, ruled_out="the subject does not offer Trains")
    assert by_predicate.outcome is Outcome.NOT_APPLICABLE
    assert by_predicate.items[0].outcome is Outcome.NOT_APPLICABLE


def test_the_evidence_is_filed_under_its_item(make):
    item = make.item("s.a", evidence=[make.evidence("elsewhere")])
    assert settle(item, Severity.LOW).evidence[0].item == item.nodeid


def test_settling_twice_changes_nothing(make):
    missed = make.evidence("x", "loss", 2.0, limit=1.0, direction="at_most", level="warn")
    for outcome in ("pass", "warn", "flaky", "fail", "error", "not_measured", "not_applicable"):
        for evidence in ([], [missed]):
            once = settle(make.item("s.a", outcome, evidence=evidence), Severity.MEDIUM)
            assert settle(once, Severity.MEDIUM) == once


@pytest.mark.parametrize(
    ("severity", "low", "high"),
    [("critical", 0, 0), ("high", 0, 0), ("medium", HALF, HALF), ("low", HALF, HALF)],
)
def test_severe_checks_are_as_good_as_their_worst_item(make, severity, low, high):
    result = rolled(make, severity, make.item("s.a"), make.item("s.a", "fail", number=1))
    assert (result.outcome, result.low, result.high) == (Outcome.FAIL, low, high)


@pytest.mark.parametrize(
    ("severity", "low", "high"), [("high", 0, HALF), ("medium", Fraction(1, 4), Fraction(3, 4))]
)
def test_an_unmeasured_item_beside_a_flaky_one(make, severity, low, high):
    result = rolled(
        make, severity, make.item("s.a", "flaky"), make.item("s.a", number=1, evidence=0)
    )
    assert (result.outcome, result.low, result.high) == (Outcome.NOT_MEASURED, low, high)


def test_a_check_without_items_is_not_measured(make):
    result = rolled(make, "low")
    assert (result.outcome, result.low, result.high) == (Outcome.NOT_MEASURED, 0, 1)
    assert result.reason == "no test of this check ran"


def test_the_reason_is_that_of_the_worst_item(make):
    result = rolled(
        make,
        "high",
        make.item("s.a", "not_measured", number=0, reason="skipped"),
        make.item("s.a", "fail", number=1, reason="broken"),
        make.item("s.a", "fail", number=2, reason="broken too"),
    )
    assert result.reason == "broken (and 1 more like it of 3 items)"


@pytest.mark.parametrize(
    ("outcome", "expires", "expected"),
    [
        ("fail", "2026-06-16", "xfail"),
        ("fail", "2026-06-15", "xfail"),
        ("fail", "2026-06-14", "fail"),
        ("error", "2026-06-14", "fail"),
        ("warn", "2026-06-16", "xfail"),
        ("flaky", "2026-06-14", "fail"),
        ("pass", "2026-06-16", "xpass"),
        ("pass", "2026-06-14", "xpass"),
        ("not_measured", "2026-06-16", "not_measured"),
    ],
)
def test_waivers(make, outcome, expires, expected):
    result = rolled(
        make, "medium", make.item("s.a", outcome), waivers=[make.waiver("s.a", expires)]
    )
    assert result.outcome == expected
    assert (result.low, result.high) == ((0, 1) if expected == "not_measured" else (0, 0))
    if expected == "fail":
        assert "its waiver expired on 2026-06-14 (ann, #7)" in result.reason


def test_of_two_waivers_the_later_one_counts(make):
    waivers = [make.waiver("s.a", "2026-01-01"), make.waiver("s.a", "2026-12-31")]
    result = rolled(make, "high", make.item("s.a", "fail"), waivers=waivers)
    assert result.outcome is Outcome.XFAIL


def test_overlapping_shards_keep_the_worse_record(make):
    good, bad = make.item("s.a"), make.item("s.a", "fail")
    assert unique([good, bad, good]) == unique([bad, good]) == [bad]


@pytest.mark.parametrize("severity", ["critical", "high", "medium", "low"])
@pytest.mark.parametrize("other", ["flaky", "warn"])
def test_a_skip_beside_another_result_of_an_item_takes_nothing_away(make, severity, other):
    """It hid that a check was flaky: at most 1/2 became at most 1, and nothing blocked."""
    records = [make.item("s.a", other), make.item("s.a", "not_measured", evidence=0)]
    result = rolled(make, severity, *records)
    red = severity in ("critical", "high") and other == "warn"
    assert (result.low, result.high) == (0, 0 if red else HALF)
    assert result.outcome == ("fail" if red else "not_measured")
    assert other in {item.outcome for item in result.items} or red
    assert [evidence.name for item in result.items for evidence in item.evidence] == ["value_0"]
    assert f"why {other}" in result.reason
    assert rolled(make, severity, *reversed(records), *result.items) == result


def test_results_of_one_item_are_not_averaged(make):
    """As items of their own a skip would lift a warning from 1/2 to at most 3/4."""
    again = [make.item("s.a", outcome) for outcome in ("warn", "not_measured", "flaky", "pass")]
    result = rolled(make, "low", *again, make.item("s.a", number=1))
    assert (result.low, result.high) == (HALF, Fraction(3, 4))
    name = again[0].nodeid
    others = [f"{name} (also flaky)", f"{name} (also warn)"]
    assert [item.nodeid for item in result.items[:3]] == [name, *others]
    assert all(e.item == item.nodeid for item in result.items for e in item.evidence)
