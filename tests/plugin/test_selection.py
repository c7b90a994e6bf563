"""Which items run: profile, suites, checks, and what pytest itself deselects."""

from __future__ import annotations

import re

import pytest

SOURCE = """
@pytest.mark.forge_check("mine.a", title="A", severity="high")
@pytest.mark.parametrize("n", [1, 2])
def test_a(evidence, n): evidence.record("x", n)

@pytest.mark.forge_check("other.b", title="B", severity="low")
def test_b(evidence): evidence.record("x", 1)

@pytest.mark.forge_check("nightly.only")
def test_nightly(evidence): evidence.record("x", 1)

def test_plain(): pass
"""
CATALOGUE = """
[[check]]
id = "nightly.only"
title = "Only at night"
suite = "nightly"
severity = "high"
component = "mine"
profiles = ["nightly"]
"""


@pytest.fixture
def selected(told, pytester):
    (pytester.path / "catalogue.toml").write_text(CATALOGUE, encoding="utf-8")

    def run(*options, **settings):
        return told(SOURCE, *options, **settings)

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["test_a[1]", "test_a[2]", "test_b"]),
        (("--forge-profile", "nightly"), ["test_a[1]", "test_a[2]", "test_b", "test_nightly"]),
        (("--forge-suite", "other"), ["test_b"]),
        (("--forge-suite", "other", "--forge-suite", "nightly"), ["test_b"]),
        (("--forge-check", "mine.a"), ["test_a[1]", "test_a[2]"]),
        (
            ("--forge-check", "mine.a", "--forge-suite", "other"),
            ["test_a[1]", "test_a[2]", "test_b"],
        ),
    ],
    ids=["profile", "nightly", "suite", "profile_and_suite", "check", "both"],
)
def test_options_select(selected, options, expected):
    run = selected(*options)
    assert sorted(run.items) == expected
    assert {item["outcome"] for item in run.items.values()} == {"pass"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--forge-suite", "othr"), "Unknown suite 'othr'. Did you mean 'other'?"),
        (("--forge-check", "mine.aa"), "Unknown check 'mine.aa'. Did you mean 'mine.a'?"),
        (
            ("--forge-check", "nightly.only"),
            "Check 'nightly.only' is not in the quick profile; choose the profile nightly.",
        ),
        (("--forge-shard", "3/2"), "Shard '3/2' is not I/N; expected 1/N to N/N"),
        (("--forge-shard", "1/99"), "Shard 1/99 would be empty"),
        (
            ("--forge-shard", "1/2", "--forge-suite", "other"),
            "--forge-shard 1/2 cuts the whole profile; leave --forge-suite and --forge-check out",
        ),
    ],
)
def test_wrong_names_are_usage_errors(selected, options, sentence):
    run = selected(*options)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert sentence in run.output
    assert not run.items


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--forge-check", "mine.aa"), "Did you mean 'mine.a'?"),
        (("--forge-shard", "1/99"), "Shard 1/99 would be empty"),
        (("--forge-shard", "x"), "Shard 'x' is not I/N"),
    ],
)
def test_a_wrong_name_is_a_usage_error_under_xdist_too(selected, options, sentence):
    run = selected(*options, "-n", "1", subprocess=True)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert sentence in run.output
    assert "INTERNALERROR" not in run.output


UNPLACED = """
@pytest.mark.forge_check("nobody.knows")
def test_unknown(evidence): evidence.record("x", 1)
"""


@pytest.mark.parametrize("count", [1, 2, 15])
def test_every_item_is_in_exactly_one_shard(selected, count):
    ran, passed = [], 0
    for index in range(count):
        run = selected("--forge-shard", f"{index + 1}/{count}")
        ran += [set(run.items)]
        passed += sum(int(number) for number in re.findall(r"(\d+) passed", run.output))
    assert sorted(name for items in ran for name in items) == ["test_a[1]", "test_a[2]", "test_b"]
    assert sum("test_a[1]" in items for items in ran if "test_a[2]" in items) == 1
    # 12 shipped suites and the quality study, and two of its own: each part is a shard.
    assert sum(bool(items) for items in ran) == {1: 1, 2: 1, 15: 2}[count] or count == 2
    assert passed == 4, "a test that is no check runs once too"


def test_what_belongs_to_no_check_is_for_the_first_shard(told):
    for shard, expected in (("1/2", ["test_unknown"]), ("2/2", [])):
        run = told(UNPLACED, "--forge-shard", shard)
        assert sorted(run.items) == expected


def test_what_pytest_deselects_is_not_measured(selected):
    run = selected("-k", "test_a[1] or plain")
    assert run.outcome("test_a[1]") == "pass"
    for name in ("test_a[2]", "test_b"):
        assert run.outcome(name) == "not_measured"
        assert run.reason(name) == "deselected by an option of pytest"
    assert "test_nightly" not in run.items
    assert run.finished["lost"] == 0


def test_what_a_stop_leaves_out_is_not_measured(told):
    source = SOURCE.replace('evidence.record("x", n)', "assert False")
    run = told(source, "-x")
    assert run.outcome("test_a[1]") == "fail"
    assert run.outcome("test_a[2]") == "not_measured"
    assert "stopping after 1 failures" in run.reason("test_a[2]")


def test_nothing_selected_is_exit_code_five(session):
    result = session(SOURCE, "--forge-suite", "state")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_bad_catalogue_is_a_usage_error(told, pytester):
    (pytester.path / "catalogue.toml").write_text("[[check]]\nid = 3\n", encoding="utf-8")
    run = told(SOURCE)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "catalogue.toml: check 1: id: " in run.output


@pytest.mark.parametrize("options", [(), ("-n", "1")])
def test_two_files_whose_tests_would_stand_for_each_other_are_a_usage_error(
    told, pytester, options
):
    # Relative to the first path both are test_size.py::test_fits; the last of them would be both.
    source = (
        "import pytest\n"
        "@pytest.mark.forge_check('mine.{0}', title='T', severity='{1}')\n"
        "def test_fits(evidence): evidence.at_most('x', {2}, limit=1, reason='r')\n"
    )
    for name, severity, value in (("alpha", "high", 5), ("beta", "low", 0)):
        (pytester.path / name).mkdir()
        text = source.format(name, severity, value)
        (pytester.path / name / "test_size.py").write_text(text, encoding="utf-8")
    (pytester.path / "root").mkdir()
    paths = [str(pytester.path / name) for name in ("alpha", "beta")]
    run = told(
        "", *paths, "--rootdir", str(pytester.path / "root"), *options, subprocess=bool(options)
    )
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "both hold a test 'test_size.py::test_fits'" in run.output
    assert not run.items
