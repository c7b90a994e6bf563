"""The reports of a run directory are rendered again, and must be what they were."""

from __future__ import annotations

import json

import pytest

from forge_harness import policy
from forge_harness.canonical import canonical_json, file_sha256
from forge_harness.finish import finish_run
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.paths import suites_dir
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


def edited(path, file="report.md"):
    """An edited report, under a manifest that is made anew."""
    (path / file).write_text((path / file).read_text(encoding="utf-8").replace("FAIL", "PASS"))
    RunDirectory.open_existing(path).seal()


def noted_files(path):
    """A run that is recorded as today, with the digests of what it left: it has reports.json."""
    record = read_record(path).model_copy(update={"files": {}})
    finish_run(path, record, POLICY, ("html", "json", "md", "junit"))


def test_what_another_release_rendered_otherwise_is_not_judged(run, monkeypatch):
    edited(run)
    monkeypatch.setattr(provenance, "renderer", lambda: "forge-harness 9.9.9")
    found = again(run)
    # Where its pages are those of today there is nothing to be unsure of.
    assert (found.problems, found.same) == ([], ["report.html", "report.json", "junit.xml"])
    assert found.unknown == {"report.md": f"made by {renderer()}"}


def test_a_page_that_was_compared_with_another_shipped_policy_is_not_judged(tmp_path, monkeypatch):
    path = compared_run(tmp_path)
    made_by = renderer()
    for name in ("catalogue.toml", "policy.toml"):
        text = (suites_dir() / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(
            text.replace("accuracy.at_least = 0.85", "accuracy.at_least = 0.9")
        )
    monkeypatch.setattr(policy, "suites_dir", lambda: tmp_path)
    # With the code alone in the renderer the sound pages would be called forged here.
    assert {problem.what for problem in again(path).problems} == {"is not the report of this run"}
    monkeypatch.setattr(provenance, "renderer", renderer.__wrapped__)
    found = again(path)
    # JUnit has no place for the alert.
    assert (found.problems, found.same) == ([], ["junit.xml"])
    assert set(found.unknown.values()) == {f"made by {made_by}"}


@pytest.mark.parametrize("note", ["gone", "empty"])
def test_what_nothing_is_said_of_is_the_plain_report(run, note):
    noted_files(run)
    if note == "gone":
        (run / REPORTS).unlink()
    else:
        (run / REPORTS).write_bytes(canonical_json({"files": {}, "schema_version": "1.0"}))
    assert (again(run).same, again(run).problems) == (FILES, [])
    edited(run)
    assert verify_run(run) == []
    found = again(run)
    (problem,) = found.problems
    assert (problem.file, found.unknown) == ("report.md", {})
    assert problem.what == "is not the plain report of this run, and reports.json says of no other"
    assert problem.found == f"sha256:{file_sha256(run / 'report.md')}"


def test_a_run_from_before_anything_was_said_is_not_judged_and_never_the_same(run):
    (run / REPORTS).unlink()
    edited(run)
    found = again(run)
    assert found.unknown == {"report.md": "nothing says what made it"}
    assert "report.md" not in found.same
    assert found.problems == []


def test_a_page_with_a_baseline_of_which_nothing_is_said_any_more_is_named(tmp_path):
    path = compared_run(tmp_path)
    record = read_record(path).model_copy(update={"files": {}})
    baseline, history = support.compared_with()
    finish_run(path, record, support.POLICY, ("md",), baseline=baseline, history=history)
    assert "report.md" in again(path).same
    (path / REPORTS).unlink()
    assert "report.md" in {problem.file for problem in again(path).problems}


def test_what_stands_in_its_place_and_is_no_file_is_named(run):
    (run / REPORTS).unlink()
    (run / REPORTS).mkdir()
    (problem,) = again(run).problems
    assert (problem.file, problem.what, problem.found) == (
        *(REPORTS, "cannot be read"),
        "Is a directory",
    )


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
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("forge_harness.report.write_reports", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_run(run, read_record(run), POLICY, ("md",))
    assert "report.md" not in json.loads((run / REPORTS).read_bytes())["files"]
    edited(run)
    assert again(run).unknown == {"report.md": "nothing says what made it"}


def test_a_damaged_note_gives_way_to_reports_that_are_made_anew(run):
    noted_files(run)
    edited(run, "junit.xml")
    (run / REPORTS).write_bytes(b'{"files": {}, "files": {}}')
    assert again(run).problems[0].found == "key 'files' is there twice"
    finish_run(run, read_record(run), POLICY, ("md",))
    found = again(run)
    assert found.same == ["report.html", "report.json", "report.md"]
    assert [problem.file for problem in found.problems] == ["junit.xml"]


def test_a_record_as_the_baseline_is_noted_as_one(run):
    before = record_of([make_item("x"), make_item("y")]).model_copy(update={"run_id": "before"})
    finish_run(run, read_record(run), POLICY, ("md",), baseline=before)
    assert again(run).leaning == {"report.md": "baseline before"}


def test_every_format_is_one_of_the_files(run, tmp_path):
    finish_run(run, read_record(run), POLICY, FORMATS)
    assert len(again(run).same) == len(FORMATS)


def test_the_renderer_is_of_the_code_and_what_draws():
    assert renderer() == renderer()
    for word in ("forge-harness ", "matplotlib ", "jinja2 ", "Python "):
        assert word in renderer()
