"""A run directory is recomputed; every lie in it is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.errors import RunDirectoryError
from forge_harness.rundir import RunDirectory, left_files, read_record
from forge_harness.scoring import Scope, assemble, only_in_manifest, verify_run
from forge_harness.scoring.assembly import items_of
from forge_harness.types import Level

CHECKS = (("a.x", "critical"), ("a.y", "medium"), ("b.x", "high"))
PAYLOAD = b"raw samples"
DIGEST = sha256_hex(PAYLOAD)


@pytest.fixture
def sealed(make, tmp_path):
    """A sealed run of three checks with an artifact, a large float and a near miss."""
    policy = make.policy(*CHECKS)
    items = [
        make.item(
            "a.x",
            evidence=[
                make.evidence(
                    "", "samples", f"sha256:{DIGEST}", artifact=f"evidence/sha256/{DIGEST}"
                )
            ],
        ),
        make.item(
            "a.y",
            evidence=[
                make.evidence(
                    "", "loss", 1.5, limit=1.0, direction="at_most", level=Level.WARN.value
                )
            ],
        ),
        make.item("b.x", evidence=[make.evidence("", "bytes", 1e20)]),
    ]
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    record = assemble(policy, items, scope=Scope(), context=make.context())
    path = tmp_path / "run"
    directory = RunDirectory.create(path, record=stub, policy=policy)
    (path / "evidence" / "sha256").mkdir(parents=True)
    (path / "evidence" / "sha256" / DIGEST).write_bytes(PAYLOAD)
    for item in items_of(record):
        directory.append_item(item)
    directory.write_final(record, policy)
    directory.seal()
    return path


def edit(path, change, file="run.json", *, reseal=True):
    """Changes a file as JSON and seals again: a forger who knows the manifest."""
    # 1e20 is printed without a point; as an integer it would not be canonical JSON.
    values = json.loads((path / file).read_bytes(), parse_int=float)
    change(values)
    (path / file).write_bytes(canonical_json(values))
    if reseal:
        RunDirectory.open_existing(path).seal()


def found(path):
    return [(d.file, d.what) for d in verify_run(path)]


def test_a_true_run_verifies(sealed):
    assert verify_run(sealed) == []


def test_every_flipped_byte_of_every_file_is_named(sealed):
    for file in sorted(p for p in sealed.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 40)):
            broken = bytearray(whole)
            broken[position] ^= 0x01
            file.write_bytes(bytes(broken))
            problems = verify_run(sealed)
            assert problems, (file.name, position)
            assert problems[0].file == file.relative_to(sealed).as_posix()
        file.write_bytes(whole)
    assert verify_run(sealed) == []


def test_without_a_manifest_the_run_was_not_finished(sealed):
    (sealed / "manifest.json").unlink()
    first = verify_run(sealed)[0]
    assert (first.file, first.what) == ("manifest.json", "the run was not finished")


def test_a_stub_was_not_finished(make, tmp_path):
    policy = make.policy(*CHECKS)
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    RunDirectory.create(tmp_path / "r", record=stub, policy=policy).seal()
    first = verify_run(tmp_path / "r")[0]
    assert (first.file, first.what, first.found) == (
        "run.json",
        "the run was not finished",
        "state 'running'",
    )


def change_outcome(run):
    run["checks"][1]["outcome"] = "pass"


def change_item(run):
    run["checks"][1]["items"][0]["outcome"] = "pass"


def change_value(run):
    run["checks"][1]["evidence"][0]["value"] = 0.5


def drop_evidence(run):
    run["checks"][2]["evidence"] = []


def raise_score(run):
    run["score"]["low"] = 100


def pass_verdict(run):
    run["verdict"] = "PASS"


def drop_reasons(run):
    run["verdict_reasons"] = []


def raise_coverage(run):
    run["coverage"] = 0.5


def raise_credit(run):
    run["checks"][1]["credit_low"] = "1"


def suite_counts(run):
    run["suites"][0]["counts"] = {"pass": 2}


def drop_check(run):
    del run["checks"][2]


def foreign_digest(run):
    run["policy_digest"] = "sha256:" + "0" * 64


def smaller_scope(run):
    run["scope"]["in_scope"] = 2


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (change_outcome, "$.checks[1].outcome"),
        (change_item, "$.checks[1].items[0].outcome"),
        (drop_evidence, "$.checks[2].outcome"),
        (raise_score, "$.score.low"),
        (pass_verdict, "$.verdict"),
        (drop_reasons, "$.verdict_reasons"),
        (raise_coverage, "$.coverage"),
        (raise_credit, "$.checks[1].credit_low"),
        (suite_counts, "$.suites[0].counts.pass"),
        (drop_check, "$.checks"),
        (foreign_digest, "$.policy_digest"),
        (smaller_scope, "$.scope.in_scope"),
    ],
)
def test_a_forged_record_is_named_by_path(sealed, change, where):
    edit(sealed, change)
    places = found(sealed)
    assert ("run.json", where) in places


def test_an_evidence_value_is_held_against_its_limit(sealed):
    def forge(run):
        check = run["checks"][1]
        check["evidence"][0]["level"] = "fail"
        check["outcome"] = check["items"][0]["outcome"] = "warn"

    edit(sealed, forge)
    outcome = next(d for d in verify_run(sealed) if d.what == "$.checks[1].items[0].outcome")
    assert (outcome.expected, outcome.found) == ('"fail"', '"warn"')


def test_causes_come_before_what_follows_from_them(sealed):
    def forge(run):
        run["score"] = {"low": 100, "high": 100}
        run["checks"][1]["items"][0]["outcome"] = "pass"

    edit(sealed, forge)
    places = [what for _, what in found(sealed)]
    assert places[0].startswith("$.checks[1]")
    assert places[-2].startswith("$.score")
    assert places[-1] == "suites/test_a_y.py::test[0]"  # in items.jsonl


def test_a_changed_policy_changes_its_digest(sealed):
    def cheaper(policy):
        policy["severity_weights"]["medium"] = 1

    edit(sealed, cheaper, "policy.json")
    places = found(sealed)
    assert places[0] == ("run.json", "$.policy_digest")
    assert ("run.json", "$.suites[0].low") in places


def test_an_artifact_is_what_its_name_says(sealed):
    (sealed / "evidence" / "sha256" / DIGEST).write_bytes(b"other samples")
    RunDirectory.open_existing(sealed).seal()
    (problem,) = verify_run(sealed)
    assert problem.file == f"evidence/sha256/{DIGEST}"
    assert problem.found == f"sha256:{sha256_hex(b'other samples')}"


def test_a_missing_artifact(sealed):
    (sealed / "evidence" / "sha256" / DIGEST).unlink()
    RunDirectory.open_existing(sealed).seal()
    (problem,) = verify_run(sealed)
    assert (problem.file, problem.found) == (f"evidence/sha256/{DIGEST}", "no file")


def test_an_artifact_outside_the_run_is_refused(sealed):
    def forge(run):
        run["checks"][0]["evidence"][0]["artifact"] = "evidence/sha256/../../../secret"

    edit(sealed, forge)
    assert ("run.json", "$.checks[0].evidence[0].artifact") in found(sealed)


def test_an_artifact_of_another_digest(sealed):
    def forge(run):
        run["checks"][0]["evidence"][0]["value"] = "sha256:" + "0" * 64

    edit(sealed, forge)
    assert found(sealed) == [
        ("run.json", "$.checks[0].evidence[0].value"),
        ("items.jsonl", "suites/test_a_x.py::test[0]"),
    ]


STUDY, LOG = b'[{"task": "digits"}]', b"1 passed"


@pytest.fixture
def studied(make, tmp_path):
    """A sealed run that left a study and a log, and says so in its record."""
    policy, item = make.policy(("a.x", "high")), make.item("a.x")
    path = tmp_path / "studied"
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    directory = RunDirectory.create(path, record=stub, policy=policy)
    directory.append_item(item)
    (path / "logs").mkdir()
    (path / "logs" / "pytest.log").write_bytes(LOG)
    (path / "study.json").write_bytes(STUDY)
    context = replace(make.context(), files=left_files(path))
    directory.write_final(assemble(policy, [item], scope=Scope(), context=context), policy)
    directory.seal()
    return path


def test_study_and_logs_are_what_the_record_says(studied):
    assert read_record(studied).files == {
        "logs/pytest.log": f"sha256:{sha256_hex(LOG)}",
        "study.json": f"sha256:{sha256_hex(STUDY)}",
    }
    assert verify_run(studied) == []
    assert only_in_manifest(studied, read_record(studied)) == []


@pytest.mark.parametrize("name", ["study.json", "logs/pytest.log"])
@pytest.mark.parametrize("content", [b"other", None])
def test_a_study_or_log_that_was_changed_is_named(studied, name, content):
    recorded = read_record(studied).files[name]
    (studied / name).unlink()
    if content is not None:
        (studied / name).write_bytes(content)
    RunDirectory.open_existing(studied).seal()
    (problem,) = verify_run(studied)
    assert (problem.file, problem.what) == (name, "is not what run.json says")
    now = "no file" if content is None else f"sha256:{sha256_hex(content)}"
    assert (problem.expected, problem.found) == (recorded, now)


def test_a_log_the_record_does_not_know_is_named(studied):
    (studied / "logs" / "more").mkdir()
    (studied / "logs" / "more" / "study.log").write_bytes(b"x")
    RunDirectory.open_existing(studied).seal()
    (problem,) = verify_run(studied)
    assert (problem.file, problem.expected) == ("logs/more/study.log", "no file")


def test_a_record_that_names_files_elsewhere_reads_none(studied, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    edit(studied, lambda run: run["files"].update({"../secret": f"sha256:{sha256_hex(b'x')}"}))
    assert found(studied) == [("../secret", "is not what run.json says")]


def test_a_run_recorded_before_they_were_noted_verifies_and_what_was_not_is_told(studied):
    edit(studied, lambda run: run.pop("files"))
    (studied / "notes.txt").write_text("mine")
    (studied / "study.json").write_bytes(b"other")
    RunDirectory.open_existing(studied).seal()
    assert verify_run(studied) == []
    told = only_in_manifest(studied, read_record(studied))
    assert told == ["logs/pytest.log", "notes.txt", "study.json"]


def test_an_older_record_that_is_written_again_keeps_its_bytes(studied):
    edit(studied, lambda run: run.pop("files"))
    before = (studied / "run.json").read_bytes()
    record = read_record(studied)
    assert "files" not in record.model_dump(mode="json")
    (studied / "run.json").write_bytes(canonical_json(record.model_dump(mode="json")))
    assert (studied / "run.json").read_bytes() == before


def test_an_artifact_is_in_the_record(sealed):
    assert only_in_manifest(sealed, read_record(sealed)) == []


def test_a_line_with_a_key_twice_is_no_item(sealed):
    text = (sealed / "items.jsonl").read_bytes()
    assert text.startswith(b'{"attempts":1,')
    (sealed / "items.jsonl").write_bytes(b'{"attempts":9,' + text[1:])
    RunDirectory.open_existing(sealed).seal()
    (problem,) = verify_run(sealed)
    assert (problem.file, problem.found) == ("items.jsonl", "key 'attempts' is there twice")


@pytest.mark.parametrize("file", ["run.json", "policy.json", "manifest.json"])
def test_a_key_that_is_there_twice_is_no_json_of_ours(sealed, file):
    raw = (sealed / file).read_bytes()
    name = raw[1 : raw.index(b":")]
    (sealed / file).write_bytes(b"{" + name + b":0," + raw[1:])
    if file != "manifest.json":
        RunDirectory.open_existing(sealed).seal()
    assert [place for place, _ in found(sealed)] == [file]


def test_bytes_that_are_not_canonical(sealed):
    values = json.loads((sealed / "run.json").read_bytes())
    (sealed / "run.json").write_text(json.dumps(values, indent=1))
    RunDirectory.open_existing(sealed).seal()
    assert found(sealed) == [("run.json", "is not canonical JSON")]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"verdict":"PASS"}', b"\xff"])
def test_what_is_no_record(sealed, content):
    (sealed / "run.json").write_bytes(content)
    RunDirectory.open_existing(sealed).seal()
    assert found(sealed)[0][0] == "run.json"


@pytest.mark.parametrize("shard", ["a/b", "0/2", "2", "1/2/3", "٣/٤"])
def test_what_is_no_shard(sealed, shard):
    edit(sealed, lambda run: run["scope"].update(shard=shard))
    assert found(sealed) == [("run.json", "$.scope.shard")]


def test_no_directory(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        verify_run(tmp_path / "none")
    assert [d.file for d in verify_run(tmp_path)] == ["manifest.json", "run.json", "policy.json"]


def test_a_record_that_contradicts_what_was_written_as_items_finished(make, tmp_path):
    """A forger who changes the evidence, and everything computed from it, and seals again."""
    policy = make.policy(*CHECKS)
    true = [make.item("a.x", "fail"), make.item("a.y")]
    forged = [make.item("a.x"), make.item("a.y")]
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    record = assemble(policy, forged, scope=Scope(), context=make.context())
    path = tmp_path / "r"
    directory = RunDirectory.create(path, record=stub, policy=policy)
    for item in true:
        directory.append_item(item)
    directory.write_final(record, policy)
    directory.seal()
    assert found(path) == [("items.jsonl", true[0].nodeid)]
    for content in (b"", None):  # emptied, then gone
        (path / "items.jsonl").unlink()
        if content is not None:
            (path / "items.jsonl").write_bytes(content)
        directory.seal()
        assert found(path) == [("items.jsonl", item.nodeid) for item in true]
    (path / "items.jsonl").write_bytes(b"[]\n")
    directory.seal()
    assert found(path) == [("items.jsonl", "cannot be read")]


def test_what_a_full_disk_did_not_take_is_no_contradiction(make, tmp_path):
    policy = make.policy(*CHECKS)
    items = [make.item("a.x"), make.item("a.y")]
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    record = assemble(policy, items, scope=Scope(), context=make.context(), state="aborted")
    directory = RunDirectory.create(tmp_path / "r", record=stub, policy=policy)
    directory.append_item(items[0])
    directory.write_final(record, policy)
    directory.seal()
    assert verify_run(tmp_path / "r") == []


def test_an_item_the_evidence_rules_made_worse_is_no_lie(make, tmp_path):
    policy = make.policy(("a.x", "critical"), ("a.y", "medium"), ("b.x", "low"))
    missed = {"limit": 1.0, "direction": "at_most"}
    items = [
        # A warning of a critical check fails it; a limit missed and then caught fails any.
        make.item(
            "a.x", "warn", evidence=[make.evidence("", "v", 2.0, **missed, level=Level.WARN.value)]
        ),
        make.item("a.y", "error", evidence=[make.evidence("", "v", 2.0, **missed)]),
        make.item("b.x", "not_measured", evidence=[make.evidence("", "v", 2.0, **missed)]),
    ]
    items = [
        item.model_copy(
            update={"evidence": [e.model_copy(update={"item": item.nodeid}) for e in item.evidence]}
        )
        for item in items
    ]
    stub = assemble(policy, [], scope=Scope(), context=make.context(), state="running")
    record = assemble(policy, items, scope=Scope(), context=make.context())
    assert {str(check.outcome) for check in record.checks} == {"fail"}
    path = tmp_path / "run"
    directory = RunDirectory.create(path, record=stub, policy=policy)
    for item in items:
        directory.append_item(item)
    directory.write_final(record, policy)
    directory.seal()
    assert verify_run(path) == []
    # But no line may be better than what run.json makes of it.
    text = (path / "items.jsonl").read_text(encoding="utf-8")
    (path / "items.jsonl").write_text(text.replace('"value":2', '"value":0'), encoding="utf-8")
    RunDirectory.open_existing(path).seal()
    assert {file for file, _ in found(path)} == {"items.jsonl"}


def test_commands_of_earlier_releases_still_verify(make, tmp_path):
    policy = make.policy(*CHECKS)
    context = make.context(command=["forge-harness", "run", "--policy", "p.toml"])
    stub = assemble(policy, [], scope=Scope(), context=context, state="running")
    items = [make.item(name) for name, _ in CHECKS]
    record = assemble(policy, items, scope=Scope(), context=context)
    path = tmp_path / "run"
    directory = RunDirectory.create(path, record=stub, policy=policy)
    for item in items:
        directory.append_item(item)
    directory.write_final(record, policy)
    directory.seal()
    assert verify_run(path) == []

    def earlier(values):
        for check in values["checks"]:
            check["command"] = check["command"].removesuffix(" --policy p.toml")

    edit(path, earlier)
    assert verify_run(path) == []
    edit(path, lambda values: values["checks"][0].update(command="rm -rf /"))
    assert found(path) == [("run.json", "$.checks[0].command")]
