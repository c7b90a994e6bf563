"""merge: one run from the shards of several jobs."""

from __future__ import annotations

import pytest

from forge_harness.errors import ExitCode
from forge_harness.rundir import read_record

FAST = ("environment", "dependencies")
"""Suites of a second or two each."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The shards of a real run over two suites: the others have no check in its policy."""
    import subprocess
    import sys

    from forge_harness.canonical import canonical_json
    from forge_harness.policy import load_policy

    root = tmp_path_factory.mktemp("shards")
    values = load_policy().to_json()
    values["catalogue"] = [row for row in values["catalogue"] if row["suite"] in FAST]
    values["suite_weights"] = {suite: values["suite_weights"][suite] for suite in FAST}
    (root / "policy.json").write_bytes(canonical_json(values))
    made = []
    for index in (1, 2):
        command = [sys.executable, "-m", "forge_harness", "run", "--shard", f"{index}/2"]
        command += ["--policy", "policy.json", "--run-dir", f"s{index}", "--workers", "1", "-q"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        made.append((root / f"s{index}", done))
    return made


def test_shards_are_parts_that_are_no_release(shards, invoke):
    suites = []
    for index, (path, done) in enumerate(shards, 1):
        assert f"(shard {index}/2)" in done.stdout, done.stdout + done.stderr
        record = read_record(path)
        assert (record.verdict, record.scope.shard) == ("PARTIAL", f"{index}/2")
        assert invoke("gate", path).exit_code == ExitCode.INCOMPLETE
        suites += [suite.name for suite in record.suites]
    assert sorted(suites) == sorted(FAST)


def test_merged_they_are_the_whole_run(shards, invoke, tmp_path):
    out = tmp_path / "whole"
    result = invoke("merge", *(path for path, _ in shards), "--run-dir", out)
    record = read_record(out)
    # No accelerator here, and perhaps a check of this machine that fails; never PARTIAL.
    assert record.verdict != "PARTIAL"
    assert f"{record.verdict}, quick scope: 20 of 20 checks" in result.output
    assert "Not given" not in result.output
    outcomes = {c.id: c.outcome for path, _ in shards for c in read_record(path).checks}
    assert {check.id: check.outcome for check in record.checks} == outcomes
    assert invoke("verify", out).exit_code == ExitCode.PASS
    assert invoke("gate", out).exit_code == result.exit_code
    page = (out / "report.html").read_text(encoding="utf-8")
    for shard in record.shards:
        assert f"Merged shard {shard.scope.shard}" in page
        assert shard.digest in page


def test_a_shard_that_is_missing_is_told(shards, invoke, tmp_path):
    result = invoke("merge", shards[0][0], "--run-dir", tmp_path / "whole")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert "Not given: shard 2/2. What it measures is not measured here." in result.output


def test_a_place_within_a_shard_is_refused(shards, invoke):
    path = shards[0][0]
    result = invoke("merge", path, "--run-dir", path / "whole")
    assert result.exit_code == ExitCode.USAGE
    assert "lies within" in result.output
    assert invoke("verify", path).exit_code == ExitCode.PASS


def test_a_place_within_another_run_is_refused(shards, invoke, run_of):
    other = run_of()
    result = invoke("merge", shards[0][0], "--run-dir", other / "whole")
    assert result.exit_code == ExitCode.USAGE
    assert f"lies within a run ({other}), which would no longer verify" in result.output
    assert invoke("verify", other).exit_code == ExitCode.PASS


@pytest.mark.parametrize(
    ("damage", "code"),
    [("run.json", ExitCode.VERIFICATION_FAILED), ("manifest.json", ExitCode.VERIFICATION_FAILED)],
)
def test_a_damaged_shard_is_refused(invoke, run_of, tmp_path, damage, code):
    path = run_of()
    (path / damage).write_text("{}")
    result = invoke("merge", path, "--run-dir", tmp_path / "whole")
    assert result.exit_code == code
    assert not (tmp_path / "whole").exists()


def test_an_unfinished_shard_is_refused(invoke, run_of, tmp_path):
    result = invoke("merge", run_of(seal=False), "--run-dir", tmp_path / "whole")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--shard", "3/2"), "Shard '3/2' is not I/N; expected 1/N to N/N, for example 2/3."),
        (("--shard", "1/99"), "Shard 1/99 would be empty"),
        (
            ("--shard", "1/2", "--suite", "data"),
            "--shard 1/2 cuts the whole profile; leave --suite and --check out, or --shard.",
        ),
    ],
)
def test_bad_shards_of_a_run_are_refused(invoke, tmp_path, options, sentence):
    result = invoke("run", *options, "--run-dir", tmp_path / "run")
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.output
    assert not (tmp_path / "run").exists()
