"""Run directories put together as one, which verifies by being merged again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.errors import RunDirectoryError, UsageError
from forge_harness.finish import finish_run
from forge_harness.merging import merge_runs
from forge_harness.rundir import RunDirectory, left_files, read_items, read_record
from forge_harness.scoring import Scope, assemble, only_in_manifest, verify_run
from forge_harness.types import Outcome, Verdict

from . import rundir_support as support

PAYLOAD = b"raw samples"
SOURCE = {"git_commit": "1f", "git_dirty": False}
ARTIFACT = f"evidence/sha256/{sha256_hex(PAYLOAD)}"


@pytest.fixture
def shards(tmp_path):
    """Two sealed runs of a check each, both with the same artifact and a log."""
    made = []
    for index, name in enumerate("xy", 1):
        path = tmp_path / f"shard-{index}"
        item = support.make_item(name)
        digest = f"sha256:{sha256_hex(PAYLOAD)}"
        stored = item.evidence[0].model_copy(
            update={"name": "raw", "value": digest, "artifact": ARTIFACT, "limit": None}
            | {"direction": "record", "samples": None}
        )
        item = item.model_copy(update={"evidence": [*item.evidence, stored]})
        record = assemble(
            support.POLICY,
            [item],
            scope=Scope(checks=(f"a.{name}",), shard=f"{index}/2"),
            context=replace(support.CONTEXT, run_id=f"r{index}", environment=SOURCE),
        )
        directory = RunDirectory.create(path, record=record, policy=support.POLICY)
        directory.append_item(item)
        for file, content in ((ARTIFACT, PAYLOAD), ("logs/pytest.log", name.encode())):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        finish_run(path, record, support.POLICY, ())
        made.append((path, record))
    return made


@pytest.fixture
def merged(shards, tmp_path):
    out = tmp_path / "whole"
    merge_runs(shards, support.POLICY, out, ("md",))
    return out


def test_it_is_a_whole_run_that_verifies(shards, merged):
    record = read_record(merged)
    assert (record.verdict, record.score.low, record.scope.part) == (Verdict.PASS, 100, "")
    assert [check.outcome for check in record.checks] == [Outcome.PASS, Outcome.PASS]
    assert verify_run(merged) == []
    assert {item.nodeid for item in read_items(merged)} == {"t.py::x", "t.py::y"}
    assert (merged / ARTIFACT).read_bytes() == PAYLOAD
    assert (merged / "report.md").is_file()
    for place, (path, _) in enumerate(shards, 1):
        for file in ("run.json", "logs/pytest.log"):
            kept = merged / "shards" / str(place) / file
            assert kept.read_bytes() == (path / file).read_bytes()
        assert verify_run(path) == []


def noted(shards):
    """The shards as they are recorded since a record says what the run left."""
    made = []
    for path, record in shards:
        with_files = record.model_copy(update={"files": left_files(path)})
        finish_run(path, with_files, support.POLICY, ())
        made.append((path, with_files))
    return made


def test_logs_of_the_shards_are_what_their_records_say(shards, tmp_path):
    out = tmp_path / "whole"
    merge_runs(noted(shards), support.POLICY, out, ())
    record = read_record(out)
    assert record.files == {}
    assert verify_run(out) == []
    assert only_in_manifest(out, record) == []
    (out / "shards" / "2" / "logs" / "pytest.log").write_bytes(b"other")
    (out / "logs").mkdir()
    (out / "logs" / "pytest.log").write_bytes(b"of no shard")
    assert lies(out) == [
        ("logs/pytest.log", "is not what run.json says"),
        ("shards/2/logs/pytest.log", "is not what shards/2/run.json says"),
    ]


def test_logs_of_older_shards_are_told(shards, merged, tmp_path):
    record = read_record(merged)
    assert record.files is None
    logs = [f"shards/{place}/logs/pytest.log" for place in (1, 2)]
    assert only_in_manifest(merged, record) == ["report.md", "reports.json", *logs]
    mixed = tmp_path / "mixed"
    merge_runs([*noted(shards[:1]), shards[1]], support.POLICY, mixed, ())
    record = read_record(mixed)
    assert record.files is None
    assert verify_run(mixed) == []
    assert only_in_manifest(mixed, record) == logs[1:]


def test_a_merged_run_cannot_claim_what_its_shards_do_not(shards, merged, tmp_path):
    forge(merged, lambda run: run.update(files={}))
    assert ("run.json", "$.files (merged again)") in lies(merged)
    out = tmp_path / "later"
    merge_runs(noted(shards), support.POLICY, out, ())
    forge(out, lambda run: run.pop("files"))
    assert ("run.json", "$.files (merged again)") in lies(out)


def test_the_order_they_are_given_in_changes_nothing(shards, merged, tmp_path):
    merge_runs(shards[::-1], support.POLICY, tmp_path / "again", ())
    assert (tmp_path / "again" / "run.json").read_bytes() == (merged / "run.json").read_bytes()


def forge(path, change, file="run.json"):
    """Changes a file as a forger does who knows everything but the shards' owners."""
    values = json.loads((path / file).read_bytes(), parse_int=float)
    change(values)
    (path / file).write_bytes(canonical_json(values))


def reseal(path):
    RunDirectory.open_existing(path).seal()


def lies(path):
    reseal(path)
    return [(problem.file, problem.what) for problem in verify_run(path)]


def test_a_check_that_failed_in_its_shard_cannot_pass_in_the_merged_run(shards, tmp_path):
    path, record = shards[0]
    failed = support.make_item("x").model_copy(update={"outcome": Outcome.FAIL, "reason": "no"})
    record = assemble(
        support.POLICY,
        [failed],
        scope=record.scope,
        context=replace(support.CONTEXT, run_id="r1", environment=SOURCE),
    )
    (path / "items.jsonl").write_bytes(b"")
    directory = RunDirectory.open_existing(path)
    directory.append_item(failed)
    finish_run(path, record, support.POLICY, ())
    out = tmp_path / "whole"
    assert merge_runs([(path, record), shards[1]], support.POLICY, out, ())[0].verdict == "FAIL"

    # Every number of the merged run is what its own items give, and so are its items.
    passed = [support.make_item("x"), *read_items(out)[1:]]
    good = assemble(
        support.POLICY,
        passed,
        scope=Scope(),
        context=replace(support.CONTEXT, run_id="r", shards=read_record(out).shards),
    )
    (out / "items.jsonl").write_bytes(
        b"".join(canonical_json(item.model_dump(mode="json")) + b"\n" for item in passed)
    )
    finish_run(out, good, support.POLICY, ())
    found = [problem.what for problem in verify_run(out)]
    assert "$.checks[0].outcome (merged again)" in found
    assert "$.verdict (merged again)" in found


def test_a_shard_that_was_changed_is_named(merged):
    forge(merged, lambda run: run["checks"][0].update(outcome="fail"), "shards/1/run.json")
    found = lies(merged)
    assert ("run.json", "$.shards[0].digest") in found
    assert ("shards/1/run.json", "$.checks[0].outcome") in found


def test_a_shard_that_is_gone_or_left_out_is_named(merged):
    (merged / "shards" / "2" / "run.json").unlink()
    assert ("shards/2/run.json", "cannot be read") in lies(merged)


def test_a_shard_left_out_of_the_record_is_named(merged):
    forge(merged, lambda run: run["shards"].pop())
    assert ("run.json", "$.checks[1].outcome (merged again)") in lies(merged)


def test_a_record_does_not_say_where_its_shards_are_read(merged, tmp_path):
    (tmp_path / "elsewhere.json").write_bytes((merged / "shards/1/run.json").read_bytes())
    forge(merged, lambda run: run["shards"][0].update(file="../elsewhere.json"))
    assert ("run.json", "$.shards[0].file (merged again)") in lies(merged)


def test_a_run_that_could_not_be_merged_is_no_merged_run(merged):
    forge(merged, lambda run: run.update(seed=1), "shards/2/run.json")
    assert ("run.json", "$.shards") in lies(merged)


def test_what_does_not_belong_together_leaves_nothing(shards, tmp_path):
    out = tmp_path / "none"
    with pytest.raises(UsageError, match="are the same run r1"):
        merge_runs([shards[0], shards[0]], support.POLICY, out)
    assert not out.exists()


def test_a_directory_that_holds_something_stays_as_it_is(shards, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not empty"):
        merge_runs(shards, support.POLICY, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]


def test_a_report_that_cannot_be_written_leaves_nothing(shards, tmp_path):
    with pytest.raises(UsageError, match="report format"):
        merge_runs(shards, support.POLICY, tmp_path / "whole", ("pdf",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-1", "shard-2"]
