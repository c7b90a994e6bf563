"""Ending a run directory: record first, reports if there is room, seal last."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from forge_harness import report
from forge_harness.errors import RunDirectoryError
from forge_harness.finish import finish_run
from forge_harness.report.provenance import render_again
from forge_harness.rundir import check_manifest, read_record
from forge_harness.scoring import verify_run

from .rundir_support import POLICY, make_item, record_of, start


@pytest.fixture
def run(tmp_path):
    directory = start(tmp_path / "run")
    for name in ("x", "y"):
        directory.append_item(make_item(name))
    return tmp_path / "run"


ITEMS = [make_item("x"), make_item("y")]


def test_a_finished_run_verifies(run):
    written = finish_run(run, record_of(ITEMS), POLICY, ("html", "md", "junit"))
    assert len(written) == 3
    assert all(path.stat().st_size for path in written)
    assert verify_run(run) == []
    assert read_record(run).state == "finished"


def test_it_can_be_finished_again_with_other_reports(run):
    finish_run(run, record_of(ITEMS), POLICY, ())
    assert verify_run(run) == []
    (written,) = finish_run(run, record_of(ITEMS), POLICY, ("md",))
    assert written.is_file()
    assert verify_run(run) == []


def test_only_a_started_run_is_finished(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"holds no run\.json"):
        finish_run(tmp_path, record_of(ITEMS), POLICY, ())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_reports_only(run, monkeypatch):
    def full(run_dir, record, policy, formats, **_):
        (run_dir / "report.html").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write_reports", full)
    assert finish_run(run, record_of(ITEMS), POLICY, ("html",)) == []
    assert not (run / "report.html").exists()
    assert check_manifest(run) == []
    assert verify_run(run) == []


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EACCES, os.strerror(errno.EACCES)), ValueError("cannot compute length")],
    ids=["refused", "broken"],
)
def test_another_error_of_a_report_is_not_hidden_and_costs_nothing_else(run, monkeypatch, error):
    def broken(run_dir, record, policy, formats, **_):
        raise error

    monkeypatch.setattr(report, "write_reports", broken)
    with pytest.raises(type(error)):
        finish_run(run, record_of(ITEMS), POLICY, ("html",))
    assert verify_run(run) == []
    assert read_record(run).state == "finished"


def test_a_disk_that_fills_up_leaves_the_older_report_whole(run, monkeypatch):
    finish_run(run, record_of(ITEMS), POLICY, ("md",))
    older = (run / "report.md").read_bytes()
    write = Path.write_bytes

    def full(path, content):
        if "report" not in path.name:
            return write(path, content)
        write(path, content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert finish_run(run, record_of(ITEMS), POLICY, ("md",)) == []
    assert (run / "report.md").read_bytes() == older
    assert verify_run(run) == []


def test_a_report_that_cannot_be_made_leaves_the_page_that_compares(run, monkeypatch):
    before = record_of(ITEMS).model_copy(update={"run_id": "before"})
    record = record_of(ITEMS).model_copy(update={"files": {}})
    finish_run(run, record, POLICY, ("md",), baseline=before)

    def broken(run_dir, record, policy, formats, **_):
        (run_dir / "report.html").write_text("half", encoding="utf-8")
        raise ValueError("cannot compute length")

    monkeypatch.setattr(report, "write_reports", broken)
    with pytest.raises(ValueError, match="length"):
        finish_run(run, record, POLICY, ("md", "html"))
    again = render_again(run, read_record(run), POLICY)
    assert (again.same, again.problems) == (["report.md"], [])
    assert verify_run(run) == []
