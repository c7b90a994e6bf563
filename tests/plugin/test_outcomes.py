"""Every way an item can end, and the outcome it has."""

from __future__ import annotations

import pytest

SOURCE = """
import os, time, warnings
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="high")

@mine("a")
def test_pass(evidence):
    evidence.at_most("x", 1, limit=2, reason="r")

@mine("a")
def test_no_evidence(): pass

@mine("a")
def test_over_limit(evidence):
    evidence.at_most("x", 3.5, unit="s", limit=2, reason="r")

@mine("a")
def test_swallowed(evidence):
    try:
        evidence.at_most("x", 3, limit=2, reason="r")
    except AssertionError:
        pass

@mine("a")
def test_warn(evidence):
    evidence.at_most("x", 3, limit=2, reason="r", level="warn")

@mine("a")
def test_assertion(evidence):
    evidence.record("x", 1)
    assert 1 == 2, "one is not two"

@mine("a")
def test_pytest_fail(evidence):
    pytest.fail("said so")

@mine("a")
def test_did_not_raise(evidence):
    with pytest.raises(ValueError):
        evidence.record("x", 1)

@mine("a")
def test_exception(evidence):
    evidence.record("x", 1)
    raise RuntimeError("broken\\nsecond line")

@mine("a")
def test_exit(evidence):
    raise SystemExit(0)

@pytest.fixture
def bad_setup(): assert False, "setup is broken"

@pytest.fixture
def bad_teardown():
    yield
    raise RuntimeError("teardown is broken")

@mine("a")
def test_setup(bad_setup, evidence): pass

@mine("a")
def test_teardown(bad_teardown, evidence): evidence.record("x", 1)

@mine("a")
def test_fail_and_teardown(bad_teardown, evidence): assert False, "the check itself"

@mine("a")
def test_skip(evidence):
    evidence.record("x", 1)
    pytest.skip("no such device")

@mine("a")
@pytest.mark.skipif(True, reason="never here")
def test_skipif(evidence): pass

@mine("a")
@pytest.mark.xfail(reason="known")
def test_xfail(evidence): assert False

@mine("a")
@pytest.mark.xfail(strict=True)
def test_xpass_strict(evidence): evidence.record("x", 1)


@mine("a")
@pytest.mark.xfail
def test_xfail_bare(evidence): assert False


@mine("a")
def test_fail_bare(evidence): pytest.fail()


@mine("a")
@pytest.mark.xfail(reason="known", strict=False)
def test_xpass(evidence): evidence.record("x", 1)

@mine("a")
def test_imperative_xfail(evidence): pytest.xfail("later")

@mine("a")
@pytest.mark.timeout(0.2)
def test_hangs(evidence): time.sleep(30)

@mine("a")
def test_warning(evidence):
    warnings.warn("deprecated thing", DeprecationWarning)
    evidence.record("x", 1)

@mine("a")
def test_non_finite(evidence): evidence.record("x", float("nan"))

@mine("a")
def test_twice(evidence):
    evidence.record("x", 1)
    evidence.record("x", 2)

@mine("a")
def test_subtest(evidence, subtests):
    evidence.record("x", 1)
    with subtests.test("inner"):
        assert False, "inside"

@mine("a")
def test_subtest_skip(evidence, subtests):
    evidence.record("x", 1)
    with subtests.test("inner"):
        pytest.skip("no such device")

@mine("a")
def test_subtest_skip_and_fail(evidence, subtests):
    with subtests.test("inner"):
        pytest.skip("no such device")
    with subtests.test("other"):
        assert False, "inside"

@mine("a")
def test_subtest_xfail(evidence, subtests):
    evidence.record("x", 1)
    with subtests.test("inner"):
        pytest.xfail("later")

@mine("a")
def test_skip_and_teardown(bad_teardown, evidence): pytest.skip("no such device")

@mine("a")
@pytest.mark.timeout(0.2)
def test_swallowed_timeout(evidence):
    evidence.record("x", 1)
    try:
        time.sleep(30)
    except BaseException:
        pass
    time.sleep(0.1)

@mine("a")
def test_unprintable(evidence):
    print("captured \\udcfe")
    evidence.record("name \\udcff", "value \\udcff", reason="why \\udcff")
    raise ValueError("broken \\udcff")

@mine("a")
def test_one_sided(evidence): evidence.within("x", 1, low=-float("inf"), high=2, reason="r")
"""

EXPECTED = {
    "test_pass": ("pass", ""),
    "test_no_evidence": ("not_measured", "passed without recording evidence"),
    "test_over_limit": ("fail", "x is 3.5 s, over its limit of 2 s (r)"),
    "test_swallowed": ("fail", "x is 3, over its limit of 2 (r)"),
    "test_warn": ("warn", "x is 3, over its limit of 2 (r)"),
    "test_assertion": ("fail", "one is not two"),
    "test_pytest_fail": ("fail", "said so"),
    "test_did_not_raise": ("fail", "DID NOT RAISE"),
    "test_exception": ("error", "RuntimeError: broken"),
    "test_exit": ("error", "SystemExit: 0"),
    "test_setup": ("error", "setup: setup is broken"),
    "test_teardown": ("error", "teardown: RuntimeError: teardown is broken"),
    "test_fail_and_teardown": ("fail", "the check itself"),
    "test_skip": ("not_measured", "no such device"),
    "test_skipif": ("not_measured", "never here"),
    "test_xfail": ("fail", "xfail without a waiver: known"),
    "test_xpass": ("fail", "passed although its marker says xfail: known"),
    "test_xpass_strict": ("fail", "passed although its marker says xfail: no reason given"),
    "test_xfail_bare": ("fail", "xfail without a waiver: no reason given"),
    "test_fail_bare": ("fail", "failed"),
    "test_imperative_xfail": ("fail", "xfail without a waiver: later"),
    "test_hangs": ("error", "timed out after 0.2 s"),
    "test_warning": ("pass", ""),
    "test_non_finite": ("fail", "x is nan, not finite; expected a number"),
    "test_twice": ("error", "ValueError: evidence 'x' is recorded twice in one item"),
    "test_subtest": ("fail", "inside"),
    "test_subtest_skip": ("not_measured", "a subtest was skipped: no such device"),
    "test_subtest_skip_and_fail": ("fail", "inside"),
    "test_subtest_xfail": ("fail", "xfail without a waiver: later"),
    "test_skip_and_teardown": ("error", "teardown: RuntimeError: teardown is broken"),
    "test_swallowed_timeout": ("error", "caught its timeout of 0.2 s and ran for 0.3 s"),
    "test_unprintable": ("error", r"ValueError: broken \udcff"),
    "test_one_sided": (
        "error",
        "ValueError: evidence 'x' has the bound -inf; expected finite numbers: use at_most or "
        "at_least for a limit on one side.",
    ),
}


WORDLESS = """
import json, pytest
class Mine:
    def evaluate(self):
        raise NotImplementedError
@pytest.mark.forge_check("data.alpha", title="x", severity="high")
def test_exception(evidence):
    evidence.record("x", 1)
    Mine().evaluate()
@pytest.mark.forge_check("data.alpha", title="x", severity="high")
def test_assertion(evidence):
    evidence.record("x", 1)
    raise AssertionError
"""


def test_an_error_without_words_is_named_by_its_place(told):
    items = told(WORDLESS).items
    assert {name: item["reason"] for name, item in items.items()} == {
        "test_exception": "NotImplementedError: raised in evaluate (test_it.py:6)",
        "test_assertion": "assertion failed in test_assertion (test_it.py:14)",
    }


def test_each_end_has_its_outcome(told):
    run = told(SOURCE)
    found = {name: (item["outcome"], item["reason"]) for name, item in run.items.items()}
    # pytest 8 and 9 name the class differently.
    found["test_did_not_raise"] = ("fail", found["test_did_not_raise"][1][:13])
    assert found == EXPECTED
    assert run.items["test_exception"]["log"].endswith("RuntimeError")
    assert run.items["test_pass"]["evidence"] == [
        {
            "item": "test_it.py::test_pass",
            "name": "x",
            "value": 1,
            "unit": "1",
            "limit": 2,
            "direction": "at_most",
            "level": "fail",
            "reason": "r",
            "samples": None,
            "artifact": None,
        }
    ]
    # What was measured before the failure is kept.
    assert [e["name"] for e in run.items["test_exception"]["evidence"]] == ["x"]


ONLY_SET_UP = """
@pytest.fixture
def prepared(evidence): evidence.at_most("x", 1, limit=2, reason="r")

@pytest.fixture
def too_much(evidence):
    try:
        evidence.at_most("x", 3, limit=2, reason="r")
    except AssertionError:
        pass

@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_prepared(prepared): assert False

@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_too_much(too_much): pass
"""


def test_evidence_of_a_fixture_is_none_of_a_test_that_was_not_run(told):
    run = told(ONLY_SET_UP, "--setup-only")
    found = {name: (item["outcome"], item["reason"]) for name, item in run.items.items()}
    assert found == {
        "test_prepared": ("not_measured", "its fixtures were set up, the test itself was not run"),
        "test_too_much": ("fail", "x is 3, over its limit of 2 (r)"),
    }


CATALOGUE = """
[[check]]
id = "catalogued.needs"
title = "It"
suite = "catalogued"
severity = "critical"
component = "user"
requires = ["Quantizes"]

[[check]]
id = "catalogued.ruled_out"
title = "It"
suite = "catalogued"
severity = "high"
component = "user"
requires = ["TrainsDistributed"]
not_applicable = "capability:TrainsDistributed"
"""


@pytest.fixture
def catalogued(pytester):
    (pytester.path / "catalogue.toml").write_text(CATALOGUE, encoding="utf-8")


MARKERS = """
@pytest.mark.forge_check
def test_no_id(evidence): pass

@pytest.mark.forge_check("mine.a", title="It", severity="high", gate="hard")
def test_unknown_field(evidence): pass

@pytest.mark.forge_check("Mine")
def test_bad_id(evidence): pass

@pytest.mark.forge_check("mine.a", title="It")
def test_half(evidence): pass

@pytest.mark.forge_check("mine.a", title="It", severity="hard")
def test_bad_severity(evidence): pass

@pytest.mark.forge_check("environment.python_versio")
def test_misspelt(evidence): pass

@pytest.mark.forge_check("catalogued.needs", title="Another", severity="low")
def test_catalogued(evidence): pass

@pytest.mark.forge_check("environment.python_version")
def test_shipped(evidence): evidence.record("x", 1)

@pytest.mark.forge_check("environment.text_encoding", title="Another", severity="low")
def test_shipped_otherwise(evidence): evidence.record("x", 1)

@pytest.mark.forge_check("mine.b", title="It", severity="high")
@pytest.mark.forge_check("mine.c", title="It", severity="high")
def test_two(evidence): pass

@pytest.mark.forge_check("mine.d")
def test_defined_below(evidence): evidence.record("x", 1)

@pytest.mark.forge_check("mine.d", title="It", severity="high")
def test_defines(evidence): evidence.record("x", 1)

@pytest.mark.forge_check("mine.d", title="It", severity="low")
def test_defined_otherwise(evidence): evidence.record("x", 1)
"""

PROBLEMS = {
    "test_no_id": "forge_check takes one check id",
    "test_unknown_field": "does not take gate; it takes component, severity, title",
    "test_bad_id": "Check id 'Mine' is not of the form suite.name",
    "test_half": "gives title alone",
    "test_bad_severity": "severity 'hard' is none of critical, high, medium, low",
    "test_misspelt": "Did you mean 'environment.python_version'?",
    "test_catalogued": "is in the catalogue with another title or severity",
    "test_shipped": "'environment.python_version' is a shipped check, which the shipped suites",
    "test_shipped_otherwise": "is a shipped check, which the shipped suites alone measure; choose",
    "test_two": "carries 2 forge_check markers",
    "test_defined_otherwise": "is defined twice with different titles or severities",
}


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["plain", "xdist"])
@pytest.mark.usefixtures("catalogued")
def test_an_unusable_marker_is_that_items_error(told, options):
    run = told(MARKERS, *options, subprocess=bool(options))
    for name, part in PROBLEMS.items():
        assert run.outcome(name) == "error", name
        assert part in run.reason(name)
    assert run.outcome("test_defined_below") == run.outcome("test_defines") == "pass"
    assert "INTERNALERROR" not in run.output


CAPABILITIES = """
@pytest.mark.forge_check("catalogued.needs")
def test_needs_more(evidence, subject): evidence.record("x", 1)

@pytest.mark.forge_check("catalogued.ruled_out")
def test_ruled_out(evidence, subject): evidence.record("x", 1)

@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_uses_subject(evidence, subject, forge_profile, forge_seed, policy):
    evidence.equal("name", subject.name, expected="toy", reason="r")
    evidence.equal("profile", forge_profile, expected="full", reason="r")
    evidence.equal("seed", forge_seed, expected=7, reason="r")
    evidence.equal("known", "mine.a" in policy.by_id, expected=True, reason="r")
"""


@pytest.mark.usefixtures("catalogued")
def test_missing_capabilities_are_not_measured_and_predicates_rule_out(told):
    run = told(CAPABILITIES, "--forge-profile", "full", "--forge-seed", "7")
    assert run.outcome("test_needs_more") == "not_measured"
    assert "subject 'toy' does not offer" in run.reason("test_needs_more")
    assert "(methods: " in run.reason("test_needs_more")
    assert run.outcome("test_ruled_out") == "not_applicable"
    assert run.reason("test_ruled_out") == "the subject does not offer TrainsDistributed"
    assert run.outcome("test_uses_subject") == "pass", run.reason("test_uses_subject")


UNMARKED = """
@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_check(evidence): evidence.record("x", 1)

def test_green(): pass

def test_red(): assert False, "broken helper"
"""


def test_a_failing_test_beside_checks_is_seen(told):
    run = told(UNMARKED)
    assert sorted(run.items) == ["test_check", "test_red"]
    assert run.items["test_red"]["check"] == "unknown"
    assert run.reason("test_red") == "test without a forge_check marker failed: broken helper"


def test_a_module_that_cannot_be_imported_is_seen(told, pytester):
    pytester.makepyfile(test_other="import nowhere_to_be_found")
    run = told(UNMARKED, "--continue-on-collection-errors", "test_it.py", "test_other.py")
    lost = run.items["test_other.py"]
    assert (lost["outcome"], lost["check"]) == ("error", "unknown")
    assert "No module named 'nowhere_to_be_found'" in lost["reason"]


SKIPS = """
pytest.importorskip("nowhere_to_be_found")

@pytest.mark.forge_check("mine.lost", title="It", severity="high")
def test_lost(evidence): evidence.record("x", 1)
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one_process", "workers"])
def test_a_module_that_skips_itself_is_seen_once(told, pytester, options):
    pytester.makepyfile(test_other=f"import pytest\n{SKIPS}")
    run = told(UNMARKED, *options, "test_it.py", "test_other.py", subprocess=bool(options))
    hidden = run.items["test_other.py"]
    assert (hidden["outcome"], hidden["check"]) == ("not_measured", "unknown")
    assert hidden["reason"].startswith("skipped itself whole: could not import 'nowhere_to_be")


@pytest.mark.parametrize("marked", [True, False])
def test_of_a_users_session_only_modules_that_name_the_marker_count(session, pytester, marked):
    skips = SKIPS if marked else SKIPS.replace("forge_check", "another")
    pytester.makepyfile(test_other=f"import pytest\n{skips}")
    output = session(UNMARKED, "test_it.py", "test_other.py").stdout.str()
    sentence = "test_other.py: skipped itself whole: could not import 'nowhere_to_be_found'"
    assert (sentence in output) is marked


OWN_LIMITS = """
import time
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="high")

@pytest.mark.timeout("60")
@mine("text")
def test_text(evidence): evidence.record("x", 1)

@pytest.mark.timeout(timeout=0.2)
@mine("named")
def test_named(evidence):
    evidence.record("x", 1)
    try: time.sleep(5)
    except BaseException: pass

@pytest.mark.timeout(0)
@mine("none")
def test_none(evidence): evidence.record("x", 1)
"""


def test_a_limit_of_the_tests_own_is_read_as_pytest_timeout_reads_it(told):
    run = told(OWN_LIMITS)
    assert run.outcome("test_text") == run.outcome("test_none") == "pass"
    assert run.outcome("test_named") == "error"
    assert run.reason("test_named").startswith("caught its timeout of 0.2 s")
    limits = {name.rpartition("::")[2]: mark["timeout_s"] for name, mark in run.collected.items()}
    assert limits == {"test_text": 60.0, "test_named": 0.2, "test_none": None}


@pytest.mark.parametrize(
    "option",
    [
        "--forge-timeout=nan",
        "--forge-timeout=-1",
        "--forge-timeout=1e9",
        "--forge-seed=-1",
        "--forge-seed=4294967296",
        "--forge-seed=99999999999999999999",
    ],
)
def test_an_option_out_of_its_range_is_refused(told, option):
    run = told(UNMARKED, option)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert option.partition("=")[2] in run.output
    assert run.items == {}
