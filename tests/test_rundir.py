"""The run directory: durable at every moment, sealed at the end, and no byte of it unguarded."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_harness import rundir
from forge_harness.canonical import canonical_json, digest_of
from forge_harness.errors import ExitCode, RunDirectoryError
from forge_harness.probes.limits import file_size_limited
from forge_harness.rundir import (
    MANIFEST,
    DiskFullError,
    RunDirectory,
    check_manifest,
    read_items,
    read_policy,
    read_record,
)
from forge_harness.scoring import verify_run
from forge_harness.types import Outcome

from .rundir_support import POLICY, make_item, record_of, start


@pytest.fixture
def sealed(tmp_path):
    directory = start(tmp_path / "run")
    items = [make_item("x"), make_item("y")]
    for item in items:
        directory.append_item(item)
    artifact = directory.evidence / "sha256" / "ab"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"samples")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "pytest.log").write_bytes(b"")
    directory.write_final(record_of(items), POLICY)
    directory.seal()
    return tmp_path / "run"


def test_a_sealed_run_reads_back(sealed):
    assert read_record(sealed) == record_of([make_item("x"), make_item("y")])
    assert read_policy(sealed).digest == POLICY.digest
    assert read_items(sealed) == [make_item("x"), make_item("y")]
    assert check_manifest(sealed) == []
    manifest = json.loads((sealed / MANIFEST).read_bytes())
    names = [entry["path"] for entry in manifest["files"]]
    assert names == [
        "evidence/sha256/ab",
        "items.jsonl",
        "logs/pytest.log",
        "policy.json",
        "run.json",
    ]
    body = {key: value for key, value in manifest.items() if key != "digest"}
    assert manifest["digest"] == digest_of(body)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found_by_name(sealed, data):
    files = sorted(p for p in sealed.rglob("*") if p.is_file() and p.stat().st_size)
    file = data.draw(st.sampled_from(files), label="file")
    raw = file.read_bytes()
    offset = data.draw(st.integers(0, len(raw) - 1), label="offset")
    bit = data.draw(st.integers(0, 7), label="bit")
    damaged = bytearray(raw)
    damaged[offset] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        problems = check_manifest(sealed)
    finally:
        file.write_bytes(raw)
    assert [problem.path for problem in problems] == [file.relative_to(sealed).as_posix()]


def test_every_byte_of_the_manifest_is_guarded(sealed):
    file = sealed / MANIFEST
    raw = file.read_bytes()
    for offset in range(len(raw)):
        damaged = bytearray(raw)
        damaged[offset] ^= 0x01
        file.write_bytes(damaged)
        assert [p.path for p in check_manifest(sealed)] == [MANIFEST], offset


def test_a_manifest_rewritten_with_its_digest_still_guards_the_files(sealed):
    manifest = json.loads((sealed / MANIFEST).read_bytes())
    del manifest["digest"]
    manifest["files"] = manifest["files"][1:]
    (sealed / MANIFEST).write_bytes(canonical_json({**manifest, "digest": digest_of(manifest)}))
    (problem,) = check_manifest(sealed)
    assert problem.sentence().startswith("evidence/sha256/ab: is not in the manifest")


ENTRY = {"path": "run.json", "bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [
        None,
        3,
        {},
        "run.json",
        [3],
        [{}],
        [{**ENTRY, "path": 3}],
        [{**ENTRY, "sha256": None}],
        [{**ENTRY, "bytes": "1"}],
        [{k: v for k, v in ENTRY.items() if k != "bytes"}],
        [ENTRY, ENTRY],
    ],
)
def test_a_manifest_with_its_digest_and_no_proper_entries_is_damaged(sealed, files):
    body = {"schema_version": "1.0"} | ({} if files is None else {"files": files})
    content = canonical_json({**body, "digest": digest_of(body)})
    (sealed / MANIFEST).write_bytes(content)
    (problem,) = check_manifest(sealed)
    assert (problem.path, problem.what) == (MANIFEST, "is damaged")
    assert "is damaged" in {found.what for found in verify_run(sealed)}


def test_a_manifest_of_the_same_values_in_other_bytes_is_damaged(sealed):
    values = json.loads((sealed / MANIFEST).read_bytes())
    (sealed / MANIFEST).write_text(json.dumps(values, indent=1), encoding="utf-8")
    (problem,) = check_manifest(sealed)
    assert problem.sentence() == (
        "manifest.json: is damaged: expected canonical JSON, found other bytes"
    )


def test_missing_extra_truncated_and_grown_files_are_named(sealed):
    (sealed / "policy.json").unlink()
    (sealed / "extra").write_bytes(b"")
    (sealed / "logs" / "pytest.log").write_bytes(b"grown")
    (sealed / "evidence" / "sha256" / "ab").write_bytes(b"")
    found = {problem.path: problem.what for problem in check_manifest(sealed)}
    assert found == {
        "policy.json": "is missing",
        "extra": "is not in the manifest",
        "logs/pytest.log": "was changed",
        "evidence/sha256/ab": "was changed",
    }


def test_a_link_does_not_stand_for_a_file(sealed, tmp_path):
    outside = tmp_path / "outside"
    (sealed / "run.json").rename(outside)
    (sealed / "run.json").symlink_to(outside)
    found = [(problem.path, problem.what) for problem in check_manifest(sealed)]
    assert found == [("run.json", "is not a plain file"), ("run.json", "is missing")]
    with pytest.raises(RunDirectoryError, match=r"run\.json is a link or device; remove it"):
        RunDirectory.open_existing(sealed).seal()


def test_the_stub_says_that_nothing_was_measured(tmp_path):
    start(tmp_path / "run")
    stub = read_record(tmp_path / "run")
    assert (stub.state, stub.verdict) == ("running", "INCOMPLETE")
    assert {check.outcome for check in stub.checks} == {Outcome.NOT_MEASURED}
    assert stub.score.low == 0
    first = verify_run(tmp_path / "run")[0]
    assert first.what == "the run was not finished"


KILL_ME = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from rundir_support import POLICY, make_item, record_of, start
directory = start(Path({path!r}))
directory.append_item(make_item("x"))
if {final}:
    directory.write_final(record_of([make_item("x"), make_item("y")]), POLICY)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("final", [False, True], ids=["while_running", "before_the_seal"])
def test_a_killed_run_never_verifies(tmp_path, final):
    tests = os.path.dirname(__file__)
    script = KILL_ME.format(tests=tests, path=str(tmp_path / "run"), final=final)
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    problems = verify_run(tmp_path / "run")
    assert "the run was not finished" in {problem.what for problem in problems}
    assert [item.nodeid for item in read_items(tmp_path / "run")] == ["t.py::x"]


def test_a_torn_last_line_is_left_out(sealed):
    with (sealed / "items.jsonl").open("ab") as stream:
        stream.write(b'{"nodeid": "t.py::z", "che')
    assert len(read_items(sealed)) == 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), "not empty .it holds 'thes"),
        (lambda path: path.touch(), "is a file; choose a directory that is new or empty"),
        (lambda path: start(path), "already holds a run; choose a new one"),
        (lambda path: (path.mkdir(), (path / ".hidden").touch()), "not empty .it holds '.hidden"),
    ],
    ids=["foreign", "file", "earlier_run", "hidden"],
)
def test_what_is_there_is_left_alone(tmp_path, make, sentence):
    path = tmp_path / "run"
    make(path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match=sentence) as caught:
        start(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["part", "deeper/part", "link/part"])
def test_a_place_within_a_run_is_refused(sealed, name):
    """A file its manifest does not name is damage to a run that was sound."""
    (sealed.parent / "link").symlink_to(sealed)
    where = (sealed.parent if name.startswith("link") else sealed) / name
    with pytest.raises(RunDirectoryError, match=r"lies within a run .*choose a place outside"):
        start(where)
    assert check_manifest(sealed) == []


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    start(tmp_path / "run")
    assert read_record(tmp_path / "run").state == "running"


def test_a_directory_that_holds_no_run_cannot_be_finished(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"holds no run\.json"):
        RunDirectory.open_existing(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"Cannot read .*run\.json: No such file"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": "9.0"}', encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="does not fit its schema: schema_version"):
        read_record(tmp_path)


def test_what_killed_writers_left_is_not_sealed(sealed):
    (sealed / "evidence" / "sha256" / ".cd.partial").write_bytes(b"half")
    RunDirectory.open_existing(sealed).seal()
    assert check_manifest(sealed) == []
    assert not (sealed / "evidence" / "sha256" / ".cd.partial").exists()


def test_an_item_that_does_not_fit_leaves_the_others_whole(tmp_path):
    directory = start(tmp_path / "run")
    directory.append_item(make_item("x"))
    size = (tmp_path / "run" / "items.jsonl").stat().st_size
    # The block alone: pytest itself writes to a file where its output is redirected.
    with (
        pytest.raises(DiskFullError, match="No space left for run directory") as caught,
        file_size_limited(size + 100),
    ):
        directory.append_item(make_item("y", size=300))
    assert caught.value.exit_code is ExitCode.USAGE
    assert (tmp_path / "run" / "items.jsonl").stat().st_size == size
    assert read_items(tmp_path / "run") == [make_item("x")]


def mount_tmpfs(path, size):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB, of which the reserve takes 4."""
    disk = tmp_path / "disk"
    mount_tmpfs(disk, 6 << 20)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk):
    with (disk / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"0" * 4096)
        except OSError:
            pass


def test_the_reserve_holds_the_final_record_of_a_full_disk(small_disk):
    run = small_disk / "run"
    directory = start(run)
    directory.append_item(make_item("x"))
    fill(small_disk)
    with pytest.raises(DiskFullError):
        directory.append_item(make_item("y", size=100_000))
    directory.write_final(record_of([make_item("x")], "aborted"), POLICY)
    directory.seal()
    assert check_manifest(run) == []
    record = read_record(run)
    assert (record.state, record.verdict) == ("aborted", "INCOMPLETE")
    outcomes = {check.id: check.outcome for check in record.checks}
    assert outcomes == {"a.x": Outcome.PASS, "a.y": Outcome.NOT_MEASURED}


def test_a_disk_without_room_for_the_stub_is_refused(tmp_path):
    disk = tmp_path / "disk"
    mount_tmpfs(disk, 1 << 20)
    try:
        with pytest.raises(DiskFullError, match="No space left"):
            start(disk / "run")
        assert list(disk.iterdir()) == [], "a second try must not meet the first"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("value", [1e16, 1.2345678901234567e20, 1e300, -1e16, 2.0**53])
def test_a_large_float_comes_back_as_it_was(tmp_path, value):
    item = make_item("x")
    large = item.evidence[0].model_copy(update={"value": value, "limit": 1e301, "samples": [value]})
    item = item.model_copy(update={"evidence": [large]})
    directory = start(tmp_path / "run")
    directory.append_item(item)
    assert read_items(directory.path) == [item]
    kept = record_of([item])
    directory.write_final(kept, POLICY)
    again = read_record(directory.path)
    assert again == kept
    # What was read can be written: `report` does so.
    directory.write_final(again, POLICY)
    directory.seal()
    assert check_manifest(directory.path) == []


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[" * 100_000, "{", b"\xff"])
def test_a_record_that_is_not_json_is_one_sentence(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunDirectoryError, match=r"run\.json is not JSON"):
        read_record(tmp_path)


def test_of_two_runs_that_find_a_directory_free_one_is_refused(tmp_path, monkeypatch):
    winner = start(tmp_path / "run")
    winner.append_item(make_item("x"))
    before = {path.name: path.read_bytes() for path in winner.path.iterdir()}
    # The loser looked before the winner wrote.
    monkeypatch.setattr(rundir, "check_is_free", lambda path: None)
    with pytest.raises(RunDirectoryError, match="taken by another run at the same time"):
        start(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in winner.path.iterdir()} == before


def test_an_earlier_manifest_stays_until_the_new_one_is_there(tmp_path, monkeypatch):
    directory = start(tmp_path / "run")
    directory.write_final(record_of([]), POLICY)
    directory.seal()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rundir, "write_durably", full)
    with pytest.raises(DiskFullError):
        directory.seal()
    assert check_manifest(directory.path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["run.json", "policy.json", "items.jsonl", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_plain_file_is_neither_waited_for_nor_read(sealed, name, kind):
    """One such directory among those of a history kept it waiting for ever."""
    path = sealed / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert any(problem.file == name for problem in verify_run(sealed))
    readers = {"run.json": read_record, "policy.json": read_policy}
    if name in readers:
        with pytest.raises(RunDirectoryError, match="it is not a plain file"):
            readers[name](sealed)
