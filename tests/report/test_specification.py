"""The specification map: its one data file, our values beside the claims, its documents."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest

from forge_harness.errors import UsageError
from forge_harness.paths import suites_dir
from forge_harness.record import SubjectRecord
from forge_harness.report import build_report, documents
from forge_harness.report.run_values import RUN_VALUES
from forge_harness.report.scores import COMPONENTS
from forge_harness.report.specification import SpecifiedFigure, specified

from . import support

DOCS = Path(__file__).parents[2] / "docs"
REMEDY = "run: python -m forge_harness.report.documents docs"
FIGURES = [figure for section in specified() for figure in section.figure]


def test_every_section_of_the_specification_is_there():
    assert [section.number for section in specified()] == list(range(14))
    assert all(section.figure for section in specified())


def test_every_source_exists():
    for figure in FIGURES:
        assert figure.check is None or figure.check in support.POLICY.by_id, figure.label
        assert figure.suite is None or figure.suite in support.POLICY.suite_weights
        assert figure.component is None or figure.component in COMPONENTS


def test_every_value_of_a_run_is_used():
    assert {figure.run for figure in FIGURES if figure.run} == set(RUN_VALUES)


def test_every_threshold_gate_is_a_figure():
    gates = {name.split(".")[1] for name in support.POLICY.thresholds if name[:6] == "gates."}
    assert {f"gates.{name}" for name in gates} <= {figure.check for figure in FIGURES}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"check": "a.b", "reason": "x"},
        {"suite": "a", "evidence": ["x"]},
        {"run": "mood"},
        {"check": "a.b", "unknown": 1},
    ],
)
def test_a_figure_has_exactly_one_source(fields):
    with pytest.raises(ValueError, match=r"needs one of|names evidence|which there is not|Extra"):
        SpecifiedFigure.model_validate({"label": "l", "claimed": "c", **fields})


def written_checks():
    """Check id -> the text of its suite, with the fields of f-strings as `*`."""
    found = {}
    for suite in sorted(path for path in suites_dir().iterdir() if path.is_dir()):
        text = "".join(p.read_text(encoding="utf-8") for p in sorted(suite.glob("*.py")))
        shown = re.sub(r"\{[^{}]*\}", "*", text)
        found |= dict.fromkeys(re.findall(r'forge_check\("([^"]+)"', text), shown)
    return found


def test_every_evidence_named_is_one_the_suites_record():
    """A check that is written records the names this file gives it; others wait for theirs."""
    written = written_checks()
    assert "gates.accuracy" in written
    for figure in FIGURES:
        for name in figure.evidence if figure.check in written else ():
            recorded = re.findall(r'"([^"\n]+)"', written[figure.check])
            assert any(fnmatch(name, pattern) for pattern in recorded if len(pattern) > 3), (
                f"{figure.check} records no evidence {name!r}: "
                "correct forge_harness/report/specification.toml"
            )


def test_values_of_several_tasks_are_all_named():
    rows = [
        support.evidence("", "digits.rate_low", 0.7),
        support.evidence("", "digits.rate", 0.9, limit=0.8, direction="at_least"),
        support.evidence("", "bytes.rate", 1.0, limit=0.8, direction="at_least"),
    ]
    record = support.record([support.item("training.convergence_rate", rows=rows)])
    row = row_of(build_report(record, support.POLICY), 6, "Successful executions")
    assert (row.ours, row.note) == ("0.9", "digits.rate, at least 0.8; bytes.rate 1")


def row_of(report, number, label):
    section = next(s for s in report.specification if s.number == number)
    return next(row for row in section.rows if row.label == label)


def test_our_value_is_the_recorded_one_and_links_to_it(report_of):
    row = row_of(report_of("pass"), 7, "Accuracy threshold (critical)")
    assert (row.ours, row.state, row.anchor) == ("0.97", "pass", "e-gates.accuracy-1")
    assert row.note == "accuracy, at least 0.9"


def test_checks_that_do_not_apply_are_none_that_did_not_pass():
    subject = SubjectRecord(spec="toy.py:S", name="toy", capabilities=["BuildsModel"])
    report = build_report(support.record(subject=subject), support.POLICY)
    outcomes = [check.outcome for check in report.checks if check.suite == "performance"]
    passed, left_out = outcomes.count("pass"), outcomes.count("not_applicable")
    assert left_out > 0
    assert row_of(report, 0, "Performance targets").note == (
        f"{passed} of {len(outcomes) - left_out} checks pass, 100 % measured, "
        f"{left_out} not applicable"
    )


def test_a_failed_check_shows_its_value_as_failed():
    record = support.record(support.items_of_all({"gates.accuracy": "fail"}))
    row = row_of(build_report(record, support.POLICY), 7, "Accuracy threshold (critical)")
    assert (row.ours, row.state) == ("0.5", "fail")


def test_what_did_not_run_is_not_measured(report_of):
    row = row_of(report_of("fail"), 7, "Performance benchmark (high)")
    assert (row.ours, row.state) == ("not measured", "not_measured")


def test_a_pass_without_the_number_is_not_that_number():
    items = [support.item("gates.accuracy", rows=[support.evidence("", "other", 1.0)])]
    row = row_of(
        build_report(support.record(items), support.POLICY), 7, "Accuracy threshold (critical)"
    )
    assert (row.ours, row.state) == ("not measured", "not_measured")
    assert row.note == "gates.accuracy: pass, which records no such value"


def test_a_figure_nobody_can_measure_has_its_reason(report_of):
    row = row_of(report_of("pass"), 12, "Documentation complete")
    assert (row.ours, row.state, row.anchor) == ("not measured", "not_measured", None)
    assert row.note.startswith("whether documentation is complete is a judgement")


def test_an_empty_run_measures_nothing():
    report = build_report(support.record([]), support.POLICY)
    for section in report.specification:
        for row in section.rows:
            assert row.state != "pass", (section.number, row.label, row.ours)


@pytest.mark.parametrize("name", [documents.MAP_FILE, documents.SCHEMA_FILE])
def test_the_committed_documents_are_current(name, tmp_path):
    documents.main([str(tmp_path)])
    made = (tmp_path / name).read_text(encoding="utf-8")
    assert (DOCS / name).read_text(encoding="utf-8") == made, REMEDY


def test_documents_need_a_directory(tmp_path):
    with pytest.raises(UsageError, match="Expected one directory"):
        documents.main([str(tmp_path / "missing")])


@pytest.mark.parametrize("kind", support.RECORDS)
def test_records_fit_the_published_schema(kind, run_record):
    schema = json.loads((DOCS / documents.SCHEMA_FILE).read_text(encoding="utf-8"))
    values = run_record(kind).model_dump(mode="json")
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "verdict": "GREAT"}, schema)
