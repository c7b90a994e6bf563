"""The reports of a run directory are rendered again, and must be what they were."""

from __future__ import annotations

import json

import pytest

from forge_harness.canonical import canonical_json
from forge_harness.finish import finish_run
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.report import FORMATS, provenance
from forge_harness.report.provenance import REPORTS, render_again, renderer
from forge_harness.rundir import RunDirectory, read_policy, read_record
from forge_harness.scoring import verify_run
from forge_harness.types import Outcome

from ..rundir_support import POLICY, make_item, record_of, start
from . import support

FILES = ["report.html", "report.json", "report.md", "junit.xml"]


@pytest.fixture
def run(tmp_path):
    directory = start(tmp_path / "run")
    items = [
        make_item("x"),
        make_item("y").model_copy(update={"outcome": Outcome.FAIL, "reason": "no"}),
    ]
    for item in items:
        directory.append_item(item)
    finish_run(tmp_path / "run", record_of(items), POLICY, ("html", "json", "md", "junit"))
    return tmp_path / "run"


def again(path):
    return render_again(path, read_record(path), read_policy(path))


def test_reports_of_a_sound_run_have_the_same_bytes(run):
    assert verify_run(run) == []
    found = again(run)
    assert (found.problems, found.same, found.unknown) == ([], FILES, {})


@pytest.mark.parametrize("file", FILES)
def test_a_report_that_was_changed_is_named(run, file):
    text = (run / file).read_text(encoding="utf-8")
    (run / file).write_text(text.replace("FAIL", "PASS"), encoding="utf-8")
    RunDirectory.open_existing(run).seal()
    assert verify_run(run) == []
    (problem,) = again(run).problems
    assert (problem.file, problem.what) == (file, "is not the report of this run")


def test_a_report_of_another_run_is_named(run):
    record = read_record(run)
    other = record.model_copy(update={"run_id": "another"})
    assert {problem.file for problem in render_again(run, other, POLICY).problems} == set(FILES)


def test_what_another_release_rendered_is_not_judged(run, monkeypatch):
    monkeypatch.setattr(provenance, "renderer", lambda: "forge-harness 9.9.9")
    found = again(run)
    assert (found.problems, found.same) == ([], [])
    assert found.unknown == dict.fromkeys(FILES, f"made by {renderer()}")


def test_what_nothing_is_said_of_is_not_judged(run):
    (run / REPORTS).unlink()
    assert again(run).unknown == dict.fromkeys(FILES, "nothing says what made it")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "Expecting property name"),
        (b'{"files": {"report.md": {}}}', "files.report.md.renderer: Field required"),
        (b"[]", ": Input should be a valid dictionary"),
        (b'{"schema_version": "2.0"}', "schema_version: Input should be '1.0'"),
    ],
)
def test_a_damaged_file_is_named(run, content, found):
    (run / REPORTS).write_bytes(content)
    (problem,) = again(run).problems
    assert (problem.file, problem.what) == (REPORTS, "cannot be read")
    assert found in problem.found


def test_a_page_with_a_baseline_is_rendered_with_it(run):
    record = read_record(run)
    baseline = QualityCoordinator(POLICY).baseline_of(
        record_of([make_item("x"), make_item("y")]).model_copy(update={"run_id": "before"})
    )
    finish_run(run, record, POLICY, ("md",), baseline=baseline)
    assert "before" in (run / "report.md").read_text(encoding="utf-8")
    assert again(run).same == FILES
    noted = json.loads((run / REPORTS).read_bytes())["files"]
    assert [name for name, how in noted.items() if how["baseline"]] == ["report.md"]


def compared_run(tmp_path):
    """A run of the report's own tests, sealed with pages that speak of others."""
    record = support.RECORDS["compared"]()
    stub = record.model_copy(update={"state": "running"})
    directory = RunDirectory.create(tmp_path / "compared", record=stub, policy=support.POLICY)
    for item in support.gate_items(support.FAILING | {"gates.latency": "pass"}, **support.AFTER):
        directory.append_item(item)
    baseline, history = support.compared_with()
    finish_run(directory.path, record, support.POLICY, FORMATS, baseline=baseline, history=history)
    return directory.path


def test_pages_with_a_baseline_and_a_trend_are_rendered_with_both(tmp_path):
    path = compared_run(tmp_path)
    assert verify_run(path) == []
    found = again(path)
    assert (found.problems, len(found.same), found.unknown) == ([], len(FORMATS), {})
    assert set(found.leaning.values()) == {"baseline run-20 and 4 kept runs"}
    noted = json.loads((path / REPORTS).read_bytes())["files"]["report.html"]
    assert [kept["digest"] for kept in noted["history"]["runs"]] == [
        f"sha256:run-{day}" for day in (2, 3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("history", "runs", 2, "score"), {"low": 12, "high": 12}),
        (("history", "runs", 1, "facts", "policy"), "sha256:other"),
        (("history", "runs", 3, "figures", "accuracy", "value"), 0.123),
        (("history", "left_out"), {}),
        (("baseline", "checks", "data.balance", "outcome"), "fail"),
        (("baseline", "gates", "accuracy"), 0.5),
    ],
)
def test_what_is_noted_of_other_runs_is_what_the_page_shows(tmp_path, where, value):
    path = compared_run(tmp_path)
    values = json.loads((path / REPORTS).read_bytes())
    place = values["files"]["report.html"]
    for key in where[:-1]:
        place = place[key]
    assert place[where[-1]] != value
    place[where[-1]] = value
    (path / REPORTS).write_bytes(canonical_json(values))
    assert [problem.file for problem in again(path).problems] == ["report.html"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("facts", {}, "Value error, are ; expected machine class"),
        ("started_at", "noon", "'noon' is no time"),
    ],
)
def test_a_history_that_is_none_is_named(tmp_path, key, value, words):
    path = compared_run(tmp_path)
    values = json.loads((path / REPORTS).read_bytes())
    values["files"]["report.html"]["history"]["runs"][0][key] = value
    (path / REPORTS).write_bytes(canonical_json(values))
    (problem,) = again(path).problems
    assert problem.file == REPORTS
    assert words in problem.found


def test_a_page_cut_short_is_one_of_which_nothing_is_said(run, monkeypatch):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr("forge_harness.report.write_reports", broken)
    with pytest.raises(ValueError, match="broken"):
        finish_run(run, read_record(run), POLICY, ("md",))
    assert again(run).unknown == {"report.md": "nothing says what made it"}


def test_every_format_is_one_of_the_files(run, tmp_path):
    finish_run(run, read_record(run), POLICY, FORMATS)
    assert len(again(run).same) == len(FORMATS)


def test_the_renderer_is_of_the_code_and_what_draws():
    assert renderer() == renderer()
    for word in ("forge-harness ", "matplotlib ", "jinja2 ", "Python "):
        assert word in renderer()
