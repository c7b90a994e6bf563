"""Verdicts, their reasons, and exit codes."""

import pytest

from forge_harness.scoring import Scope, assemble, exit_code_for, gate_exit_code
from forge_harness.types import Profile

GOOD = [(f"a.o{i}", "critical") for i in range(12)]


def run(make, checks, items, **options):
    options.setdefault("scope", Scope())
    options.setdefault("context", make.context())
    policy = make.policy(*checks)
    return assemble(policy, items, **options)


def all_good(make):
    return [make.item(name) for name, _ in GOOD]


def with_one(make, severity, outcome, more=(), **options):
    """Twelve critical passes and one check of the given severity and outcome."""
    items = [*all_good(make), *more]
    if outcome is not None:
        items.append(make.item("a.x", outcome))
    return run(make, [*GOOD, ("a.x", severity)], items, **options)


@pytest.mark.parametrize(
    ("severity", "outcome", "verdict", "code"),
    [
        ("critical", "pass", "PASS", 0),
        ("critical", "fail", "FAIL", 1),
        ("high", "fail", "FAIL", 1),
        ("high", "error", "FAIL", 1),
        ("high", "warn", "FAIL", 1),
        ("medium", "warn", "PASS_WITH_WARNINGS", 0),
        ("medium", "fail", "PASS_WITH_WARNINGS", 0),
        ("low", "error", "PASS_WITH_WARNINGS", 0),
        ("critical", "flaky", "FAIL", 1),
        ("high", "flaky", "PASS_WITH_WARNINGS", 0),
        ("critical", "not_measured", "INCOMPLETE", 7),
        ("high", "not_measured", "INCOMPLETE", 7),
        ("critical", None, "INCOMPLETE", 7),
        ("medium", None, "PASS_WITH_WARNINGS", 0),
    ],
)
def test_verdicts(make, severity, outcome, verdict, code):
    record = with_one(make, severity, outcome)
    assert (record.verdict, exit_code_for(record), gate_exit_code(record)) == (verdict, code, code)
    assert bool(record.verdict_reasons) == (verdict != "PASS")


@pytest.mark.parametrize("state", ["running", "interrupted", "aborted"])
def test_only_a_finished_run_passes(make, state):
    record = with_one(make, "low", "pass", state=state, state_reason="disk full")
    assert record.verdict == "INCOMPLETE"
    assert record.verdict_reasons[0] == f"the run is {state}: disk full"
    assert exit_code_for(record) == (2 if state == "interrupted" else 7)
    assert gate_exit_code(record) == 7


def test_a_failure_of_an_interrupted_run_is_still_one(make):
    record = with_one(make, "high", "fail", state="interrupted")
    assert (record.verdict, exit_code_for(record), gate_exit_code(record)) == ("FAIL", 2, 1)


def test_nothing_in_scope_is_incomplete(make):
    record = run(make, GOOD, [], scope=Scope(suites=("zzz",)))
    assert (record.verdict, exit_code_for(record)) == ("PARTIAL", 7)
    empty = run(make, [], [])
    assert (empty.verdict, empty.score.low, empty.score.high) == ("INCOMPLETE", 0, 0)


def test_little_coverage_is_incomplete(make):
    checks = [("a.x", "critical"), ("a.y", "low")]
    record = run(make, checks, [make.item("a.x")])
    assert record.verdict == "INCOMPLETE"
    assert record.verdict_reasons == ["88 % of the weight is measured, 90 % is required"]


def test_the_required_coverage_itself_is_enough(make):
    checks = [(f"a.c{i}", "low") for i in range(10)]
    record = run(make, checks, [make.item(name) for name, _ in checks[:9]])
    assert (record.coverage, record.verdict) == (0.9, "PASS_WITH_WARNINGS")


def test_a_low_score_fails(make):
    checks = [(f"a.c{i}", "low") for i in range(10)]
    items = [make.item(name, "fail" if i < 3 else "pass") for i, (name, _) in enumerate(checks)]
    record = run(make, checks, items)
    failed = "3 low checks failed: a.c0, a.c1, a.c2"
    assert record.verdict == "FAIL"
    assert record.verdict_reasons == ["the score is 70, under 80", failed]


def test_what_failed_without_blocking_is_named_beside_what_is_not_measured(make):
    checks = [("a.x", "critical"), ("a.y", "medium"), ("a.z", "low")]
    items = [make.item("a.y", "fail"), make.item("a.z", "error")]
    record = run(make, checks, items, state="interrupted")
    assert record.verdict_reasons[-2:] == [
        "1 medium check failed: a.y",
        "1 low check could not run: a.z",
    ]


MILDER = [
    ("a.m1", "medium"),
    ("a.m2", "medium"),
    ("a.m3", "medium"),
    ("a.l1", "low"),
    ("a.l2", "low"),
]


@pytest.mark.parametrize(
    ("more", "options", "verdict", "first"),
    [
        ({"a.x": "fail"}, {}, "FAIL", "critical check a.x failed"),
        ({"a.x": "pass"}, {"state": "interrupted"}, "INCOMPLETE", "the run is interrupted"),
        ({}, {}, "INCOMPLETE", "1 critical check is not measured: a.x"),
        ({"a.x": "pass"}, {"scope": Scope(suites=("a",))}, "PARTIAL", "only a selection ran"),
    ],
)
def test_what_does_not_block_is_named_after_what_does(make, more, options, verdict, first):
    outcomes = {"a.m1": "fail", "a.m2": "error", "a.m3": "fail", "a.l1": "error", "a.l2": "fail"}
    items = [make.item(name, outcome) for name, outcome in {**outcomes, **more}.items()]
    checks = [*GOOD, ("a.x", "critical"), *MILDER]
    waivers = [make.waiver("a.typo")]
    record = run(make, checks, [*all_good(make), *items], waivers=waivers, **options)
    assert record.verdict == verdict
    assert record.verdict_reasons[0].startswith(first)
    # Severe first, failed before what could not run; then what is wrong with the waivers.
    assert record.verdict_reasons[-5:] == [
        "2 medium checks failed: a.m1, a.m3",
        "1 medium check could not run: a.m2",
        "1 low check failed: a.l2",
        "1 low check could not run: a.l1",
        "a waiver names check 'a.typo', which the catalogue does not have",
    ]


def test_only_what_failed_without_blocking_is_added_to_what_blocks(make):
    severities = [("a.h", "high"), ("a.m", "medium"), ("a.w", "low")]
    items = [make.item("a.h", "fail"), make.item("a.m", "flaky"), make.item("a.w", "warn")]
    record = run(make, [*GOOD, *severities], [*all_good(make), *items])
    assert [reason.partition(":")[0] for reason in record.verdict_reasons] == [
        "high check a.h failed"
    ]


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_what_no_missing_check_can_mend_has_failed(make, state):
    """Were it INCOMPLETE, one more unmeasured check would turn `gate --fail-on fail` green."""
    checks = [(f"a.c{i}", "low") for i in range(10)]
    bad = [make.item(f"a.c{i}", "fail") for i in range(3)]
    good = [make.item(f"a.c{i}") for i in range(3, 8)]
    record = run(make, checks, [*bad, *good], state=state)
    assert record.verdict == "FAIL"
    assert record.verdict_reasons[0] == "the score is at most 70, under 80"
    hopeful = run(make, checks, [*bad[:2], *good], state=state)
    assert hopeful.verdict == "INCOMPLETE"


def test_a_suite_no_missing_check_can_mend_has_failed(make):
    checks = [("a.x", "critical"), ("a.y", "high"), ("b.x", "medium"), ("b.y", "low")]
    record = run(
        make,
        checks,
        [make.item("a.x"), make.item("b.x", "fail")],
        context=make.context(),
    )
    assert record.verdict == "FAIL"
    assert "suite b is at most 33, under 50" in record.verdict_reasons


def test_between_80_and_90_is_ready_with_notes(make):
    checks = [(f"a.c{i}", "high") for i in range(10)]
    items = [make.item(name, "flaky" if i < 3 else "pass") for i, (name, _) in enumerate(checks)]
    record = run(make, checks, items)
    assert (record.verdict, record.score.low) == ("PASS_WITH_WARNINGS", 85)
    assert "the score is 85, under 90" in record.verdict_reasons


def test_critical_reasons_come_first(make):
    checks = [("a.x", "high"), ("a.y", "critical")]
    record = run(make, checks, [make.item("a.x", "fail"), make.item("a.y", "error")])
    assert record.verdict_reasons == [
        "critical check a.y could not run: why error",
        "high check a.x failed: why fail",
    ]


@pytest.mark.parametrize(
    ("started_at", "outcome"),
    [("2026-12-31T20:00:00-10:00", "fail"), ("2027-01-01T09:00:00+14:00", "xfail")],
)
def test_a_waiver_ends_with_a_day_of_utc(make, started_at, outcome):
    """Whoever wrote down the time of his own zone had a day more, or a day less."""
    context = make.context(started_at=started_at, finished_at=started_at)
    waivers = [make.waiver("a.x")]
    record = with_one(make, "critical", "fail", waivers=waivers, context=context)
    assert record.checks[-1].outcome == outcome


def test_a_waiver_excuses_until_it_is_not_needed(make):
    waived = with_one(make, "critical", "fail", waivers=[make.waiver("a.x")])
    assert (waived.verdict, waived.checks[-1].outcome) == ("PASS_WITH_WARNINGS", "xfail")
    unneeded = with_one(make, "low", "pass", waivers=[make.waiver("a.x")])
    assert (unneeded.verdict, unneeded.checks[-1].outcome) == ("FAIL", "xpass")
    expired = with_one(make, "high", "fail", waivers=[make.waiver("a.x", "2026-06-14")])
    assert (expired.verdict, expired.checks[-1].outcome) == ("FAIL", "fail")
    last_day = with_one(make, "high", "fail", waivers=[make.waiver("a.x", "2026-06-15")])
    assert last_day.verdict == "PASS_WITH_WARNINGS"


def test_a_waiver_of_no_check_is_reported(make):
    record = with_one(make, "low", "pass", waivers=[make.waiver("a.typo")])
    assert record.verdict == "PASS_WITH_WARNINGS"
    assert record.verdict_reasons == [
        "a waiver names check 'a.typo', which the catalogue does not have"
    ]


def test_an_item_outside_the_catalogue_blocks(make):
    record = run(make, GOOD, [*all_good(make), make.item("a.unknown")])
    assert record.verdict == "FAIL"
    assert "'a.unknown'" in record.verdict_reasons[0]
    assert [item.check for item in record.unscored_items] == ["a.unknown"]


def test_an_item_nobody_can_place_says_why(make):
    why = "could not be collected: ModuleNotFoundError: No module named 'flaky'"
    broken = make.item("unknown", "error", reason=why)
    record = run(make, [("a.x", "medium")], [make.item("a.x"), broken])
    assert record.verdict == "FAIL"
    assert record.verdict_reasons == [f"{broken.nodeid} belongs to no check: {why}"]


def skipped_module(make):
    return make.item("unknown", "not_measured", evidence=0, reason="skipped itself whole: no GPU")


def test_a_module_that_hides_checks_is_as_bad_as_a_critical_check_not_measured(make):
    record = run(make, GOOD, [*all_good(make), skipped_module(make)])
    assert record.verdict == "INCOMPLETE"
    assert (exit_code_for(record), gate_exit_code(record)) == (7, 7)
    (reason,) = record.verdict_reasons
    assert "holds unknown checks, not measured: skipped itself whole: no GPU" in reason
    assert (record.score.low, record.score.high) == (100, 100)


def test_a_module_that_hides_checks_excuses_no_failure(make):
    record = with_one(make, "high", "fail", more=[skipped_module(make)])
    assert (record.verdict, gate_exit_code(record)) == ("FAIL", 1)


@pytest.mark.parametrize("outcome", ["error", "fail", "pass"])
def test_only_what_was_not_measured_hides(make, outcome):
    record = run(make, GOOD, [*all_good(make), make.item("unknown", outcome)])
    assert (record.verdict, gate_exit_code(record)) == ("FAIL", 1)


class TestSelection:
    SCOPE = Scope(checks=("a.x", "a.y"))
    CHECKS = (("a.x", "medium"), ("a.y", "high"), ("b.z", "critical"))

    def record(self, make, *items):
        return run(make, self.CHECKS, items, scope=self.SCOPE)

    def test_all_good_is_partial_and_no_release(self, make):
        record = self.record(make, make.item("a.x"), make.item("a.y"))
        assert (record.verdict, record.scope.in_scope, record.scope.total) == ("PARTIAL", 2, 3)
        assert (exit_code_for(record), gate_exit_code(record)) == (0, 7)

    def test_a_part_not_measured(self, make):
        record = self.record(make, make.item("a.y"))
        assert (record.verdict, exit_code_for(record)) == ("PARTIAL", 7)

    def test_a_module_that_may_hold_more_of_it(self, make):
        record = self.record(make, make.item("a.x"), make.item("a.y"), skipped_module(make))
        assert (record.verdict, exit_code_for(record), gate_exit_code(record)) == ("PARTIAL", 7, 7)

    def test_a_medium_failure(self, make):
        record = self.record(make, make.item("a.x", "fail"), make.item("a.y"))
        assert record.verdict == "PARTIAL"
        assert (exit_code_for(record), gate_exit_code(record)) == (1, 1)

    @pytest.mark.parametrize("outcome", ["fail", "error"])
    def test_a_failure_beside_a_part_not_measured(self, make, outcome):
        record = self.record(make, make.item("a.x", outcome))
        assert record.verdict == "PARTIAL"
        assert (exit_code_for(record), gate_exit_code(record)) == (1, 1)

    @pytest.mark.parametrize("outcome", ["warn", "flaky"])
    def test_what_does_not_fail_a_whole_run_does_not_fail_a_part(self, make, outcome):
        record = self.record(make, make.item("a.x", outcome), make.item("a.y"))
        assert (exit_code_for(record), gate_exit_code(record)) == (0, 7)

    def test_a_blocking_failure(self, make):
        record = self.record(make, make.item("a.x"), make.item("a.y", "fail"))
        assert (record.verdict, exit_code_for(record)) == ("FAIL", 1)

    def test_a_named_check_of_another_profile_is_in_scope(self, make):
        policy = make.policy(*self.CHECKS)
        nightly = policy.catalogue[0].model_copy(update={"profiles": (Profile.NIGHTLY,)})
        policy = policy.model_copy(update={"catalogue": (nightly, *policy.catalogue[1:])})
        for scope, ids in (
            (Scope(checks=("a.x",)), ["a.x"]),
            (Scope(suites=("a",)), ["a.y"]),
            (Scope(suites=("a",), profile=Profile.NIGHTLY), ["a.x", "a.y"]),
        ):
            record = assemble(policy, [], scope=scope, context=make.context())
            assert [check.id for check in record.checks] == ids


def test_the_command_reproduces_one_check(make):
    context = make.context(seed=7)
    record = run(make, GOOD, [], context=context)
    assert record.checks[0].command == (
        "forge-harness run --check a.o0 --subject reference --seed 7"
    )
    full = run(make, GOOD, [], context=context, scope=Scope(profile=Profile.FULL))
    assert full.checks[0].command.endswith("--seed 7 --profile full")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["forge-harness", "run", "--suite-path", "my checks", "--policy=p.toml", "-q"],
            "forge-harness run --check a.x --subject reference --seed 0"
            " --suite-path 'my checks' --policy=p.toml",
        ),
        (
            ["forge-harness", "run", "-c", "f.toml", "--suite", "a", "--waivers", "w.toml"],
            "forge-harness run --check a.x --subject reference --seed 0 -c f.toml --waivers w.toml",
        ),
        (["forge-harness", "run"], "forge-harness run --check a.x --subject reference --seed 0"),
        (
            ["pytest", "suites", "-n", "2", "--forge-run-dir", "r", "--forge-seed=7"],
            "pytest suites --forge-seed=7 --forge-check a.x",
        ),
    ],
    ids=["files", "short", "plain", "pytest"],
)
def test_the_command_names_the_files_that_decide(make, command, expected):
    context = make.context(command=command)
    policy = make.policy(("a.x", "low"))
    record = assemble(policy, [make.item("a.x")], scope=Scope(), context=context)
    assert record.checks[0].command == expected
