"""Writing reports: names, formats, the same bytes again."""

from __future__ import annotations

import json

import pytest

from forge_harness.canonical import canonical_json, read_canonical
from forge_harness.errors import UsageError
from forge_harness.record import RunRecord
from forge_harness.report import write_reports
from forge_harness.report.write import FORMATS

from . import support


def test_files_and_their_order(tmp_path, run_record):
    written = write_reports(tmp_path, run_record("fail"), support.POLICY, ("junit", "json", "md"))
    assert [path.name for path in written] == ["junit.xml", "report.json", "report.md"]
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert values["headline"]["low"] == 49
    assert len(values["checks"]) == 148


def test_the_json_has_all_that_the_policy_changes(tmp_path, run_record, report_of):
    write_reports(tmp_path, run_record("mild"), support.MILD, ("json",))
    head = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["headline"]
    assert head["policy_changes"] == list(report_of("mild").headline.policy_changes)
    assert len(head["policy_changes"]) == 7
    assert head["alerts"] == list(report_of("mild").headline.alerts)


def test_a_run_that_was_read_back_gives_the_same_bytes(tmp_path, run_record):
    record = run_record("fail")
    # Canonical JSON has names in the order of the alphabet, and whole floats without a point.
    kept = RunRecord.model_validate(read_canonical(canonical_json(record.model_dump(mode="json"))))
    pages = []
    for name, each in (("a", record), ("b", kept)):
        (tmp_path / name).mkdir()
        written = write_reports(tmp_path / name, each, support.POLICY, FORMATS)
        pages.append([path.read_bytes() for path in written])
    assert pages[0] == pages[1]


def test_the_same_run_gives_the_same_bytes(tmp_path, run_record):
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = write_reports(tmp_path / name, run_record("pass"), support.POLICY, FORMATS)
        pages.append([path.read_bytes() for path in written])
    assert pages[0] == pages[1]


def test_stored_files_are_linked_only_where_they_are(tmp_path):
    rows = [support.evidence("", "stored", "sha256:x", artifact=support.ARTIFACT)]
    record = support.record([support.item("data.balance", rows=rows)])
    (page,) = write_reports(tmp_path, record, support.POLICY, ("html",))
    assert f'href="{support.ARTIFACT}"' not in page.read_text(encoding="utf-8")
    (tmp_path / "evidence").mkdir()
    (page,) = write_reports(tmp_path, record, support.POLICY, ("html",))
    assert f'href="{support.ARTIFACT}"' in page.read_text(encoding="utf-8")


def test_an_unknown_format_writes_nothing(tmp_path, run_record):
    with pytest.raises(UsageError, match=r"report format.*'pdf'"):
        write_reports(tmp_path, run_record("pass"), support.POLICY, ("md", "pdf"))
    assert list(tmp_path.iterdir()) == []
