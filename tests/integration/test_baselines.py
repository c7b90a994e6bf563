"""Baselines: what a run is held against, as a record or as a file that was reviewed."""

from __future__ import annotations

import json

import pytest

from forge_harness.errors import ConfigError
from forge_harness.integration.baselines import (
    Acceptance,
    Baseline,
    baseline_of,
    compared_facts,
    not_comparable,
    read_baseline,
    write_baseline,
)
from forge_harness.record import ScopeRecord, ShardRecord

from ..rundir_support import make_item, record_of

MACHINE = {"os": "Linux", "machine": "x86_64", "cpu": "Xeon", "cpu_usable": 2}
ACCEPTANCE = Acceptance(
    owner="ada", reason="new recipe", accepted_on="2026-01-02", run_digest="sha256:1"
)


def run_of(**fields):
    record = record_of([make_item("x"), make_item("y")])
    return record.model_copy(update={"environment": MACHINE, **fields})


@pytest.fixture
def baseline():
    return baseline_of(run_of(), {"accuracy": 0.97}, ACCEPTANCE)


def test_it_reads_back_what_was_written(baseline, tmp_path):
    file = tmp_path / "b" / "forge-baseline.json"
    write_baseline(file, baseline)
    assert read_baseline(file) == baseline


def test_each_value_has_a_line_of_its_own(baseline, tmp_path):
    files = []
    for gates in ({"accuracy": 0.97, "latency": 3.5}, {"accuracy": 0.96, "latency": 3.5}):
        files.append(tmp_path / f"{len(files)}.json")
        write_baseline(files[-1], baseline.model_copy(update={"gates": gates}))
    before, after = (file.read_text().splitlines() for file in files)
    differing = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert differing == [('    "accuracy": 0.97,', '    "accuracy": 0.96,')]


def test_it_holds_every_check_with_its_version(baseline):
    assert {name: (c.version, c.outcome) for name, c in baseline.checks.items()} == {
        "a.x": (1, "pass"),
        "a.y": (1, "pass"),
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: b.pop("score"), "score: Field required"),
        (lambda b: b.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda b: b.update(acceptance=None), "a baseline nobody accepted"),
        (lambda b: b["acceptance"].update(owner=" "), "acceptance.owner: Value error, is empty"),
        (lambda b: b["acceptance"].update(reason=""), "acceptance.reason: Value error, is empty"),
        (lambda b: b["acceptance"].update(expires="soon"), "acceptance.expires: Value error"),
        (lambda b: b["facts"].pop("declared"), "facts: Value error, are machine class"),
        (lambda b: b.update(schema_version="2.0"), "schema_version: Input should be '1.0'"),
        (lambda b: b["gates"].update(accuracy="high"), "gates.accuracy: Input should be a valid"),
        (lambda b: b["checks"]["a.x"].update(outcome="fine"), "checks.a.x.outcome: Input should"),
        (lambda b: b.update(started_at="soon"), "started_at: Value error, 'soon' is no time"),
        (lambda b: b.update(coverage=7.5), "coverage: Input should be less than or equal to 1"),
        (lambda b: b["score"].update(low=9, high=3), "score: Value error, is 9 to 3; expected"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(baseline, tmp_path, change, sentence):
    values = baseline.model_dump(mode="json")
    change(values)
    (tmp_path / "b.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"b\.json") as error:
        read_baseline(tmp_path / "b.json")
    assert sentence in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[1]"])
def test_what_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(ConfigError):
        read_baseline(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"accuracy": 0.97', '"accuracy": 0.97, "accuracy": 0.5', "key 'accuracy' is there twice"),
        ('"run_id"', '"run_id": "other", "run_id"', "key 'run_id' is there twice"),
        ('"accuracy": 0.97', '"accuracy": NaN', "NaN is no JSON number"),
        ('"accuracy": 0.97', '"accuracy": 1e999', "number 1e999 is beyond float64"),
    ],
)
def test_a_file_that_can_be_read_in_two_ways_is_refused(baseline, tmp_path, old, new, words):
    file = tmp_path / "b.json"
    write_baseline(file, baseline)
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=r"b\.json is no baseline: ") as error:
        read_baseline(file)
    assert words in str(error.value)


def test_the_digest_of_a_directory_is_kept_where_it_is_known(baseline):
    assert "run_digest" not in baseline.model_dump(mode="json")
    known = baseline.model_copy(update={"run_digest": "sha256:2"})
    assert Baseline.model_validate(known.model_dump(mode="json")).run_digest == "sha256:2"


@pytest.mark.parametrize(
    ("expires", "day", "refusal"),
    [
        ("", "2099-01-01", ""),
        ("2026-01-02", "2026-01-02", ""),
        ("2026-01-01", "2026-01-02", "the baseline expired on 2026-01-01; accept a new one"),
    ],
)
def test_it_is_good_until_its_last_day(baseline, expires, day, refusal):
    limited = ACCEPTANCE.model_copy(update={"expires": expires})
    held = baseline.model_copy(update={"acceptance": limited})
    assert not_comparable(run_of(started_at=f"{day}T10:00:00Z"), held) == refusal


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"environment": {**MACHINE, "cpu": "EPYC"}}, "the machine class is Linux/x86_64/EPYC/2"),
        ({"environment": {}}, "a run does not say what machine it measured on"),
        ({"policy_digest": "sha256:other"}, "the policies differ"),
        ({"declared": {"accelerator": "none"}}, "the run declares accelerator = none"),
    ],
)
def test_runs_that_differ_do_not_compare(baseline, fields, refusal):
    assert not_comparable(run_of(**fields), baseline).startswith(refusal)
    assert not_comparable(run_of(), baseline) == ""


def test_a_shard_is_no_whole_run(baseline):
    scope = run_of().scope.model_copy(update={"checks": ["a.x"], "shard": "1/2"})
    refusal = not_comparable(run_of(scope=scope), baseline)
    assert refusal == "the run covers shard 1/2, the baseline the whole profile"


def test_a_run_merged_from_several_classes_of_machines_says_so(baseline):
    record = run_of()
    shard = ShardRecord(
        file="shards/1/run.json",
        digest="sha256:1",
        run_id="r1",
        scope=ScopeRecord.model_validate(record.scope.model_dump()),
        state="finished",
        command=[],
        environment=MACHINE,
        started_at=record.started_at,
        finished_at=None,
    )
    merged = run_of(shards=[shard], environment={"os": "Linux"})
    assert compared_facts(merged)["machine class"] is None
    refusal = not_comparable(merged, baseline)
    assert refusal == "the run was merged from machines of several classes"


def test_a_run_that_was_cut_short_is_no_baseline(baseline):
    held = Baseline.model_validate({**baseline.model_dump(), "state": "aborted"})
    assert not_comparable(run_of(), held) == "the baseline is aborted, not finished"


def test_a_commit_that_is_no_text_says_of_none():
    odd = {**MACHINE, "git_commit": ["abc"], "git_dirty": "perhaps"}
    made = baseline_of(run_of(environment=odd), {}, ACCEPTANCE)
    assert (made.commit, made.dirty) == (None, None)
