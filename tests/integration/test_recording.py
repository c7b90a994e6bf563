"""One run being recorded."""

from __future__ import annotations

from forge_harness.canonical import sha256_hex
from forge_harness.integration.recording import Recording, new_context
from forge_harness.rundir import DiskFullError, RunDirectory, check_manifest, read_record
from forge_harness.scoring import Scope
from forge_harness.types import Outcome

from ..rundir_support import CONTEXT, POLICY, make_item


def test_a_disk_that_fills_at_the_last_item_is_not_a_finished_run(tmp_path, monkeypatch):
    recording = Recording(POLICY, Scope(), CONTEXT)
    recording.start(tmp_path / "run")
    recording.add(make_item("x"))

    def full(self, item):
        raise DiskFullError("No space left for run directory run; free some and run again.")

    monkeypatch.setattr(RunDirectory, "append_item", full)
    recording.add(make_item("y"))
    record = recording.finish("finished")
    assert (record.state, record.verdict) == ("aborted", "INCOMPLETE")
    assert record.state_reason.startswith("No space left for run directory run")
    # What was measured stays, also what the item file no longer took.
    assert {check.outcome for check in record.checks} == {Outcome.PASS}
    assert read_record(tmp_path / "run") == record
    assert record.finished_at is not None
    assert check_manifest(tmp_path / "run"), "not sealed yet"


def test_the_record_has_the_digests_of_what_the_run_left(tmp_path):
    recording = Recording(POLICY, Scope(), CONTEXT)
    recording.start(tmp_path / "run")
    assert read_record(tmp_path / "run").files is None, "nothing ended yet"
    for name in ("study.json", "logs/pytest.log", "logs/deep/x.log"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    record = recording.finish("finished")
    assert record.files == {
        name: f"sha256:{sha256_hex(name.encode())}"
        for name in ("logs/deep/x.log", "logs/pytest.log", "study.json")
    }
    assert read_record(tmp_path / "run") == record
    assert Recording(POLICY, Scope(), CONTEXT).finish("finished").files == {}


def test_a_command_with_bytes_that_are_no_text_can_be_written_down():
    common = {"subject": CONTEXT.subject, "declared": {}, "seed": 3, "environment": {}}
    context = new_context(**common, command=["pytest", "run\udcff"])
    assert context.command == ["pytest", "run\\udcff"]


def test_two_runs_of_one_second_have_two_ids():
    common = {"subject": CONTEXT.subject, "declared": {}, "seed": 3, "command": ["x"]}
    first, second = (
        new_context(**common, started_at="2026-01-02T03:04:05Z", environment={}) for _ in range(2)
    )
    assert first.run_id != second.run_id
    assert first.run_id.startswith("20260102T030405Z-")
