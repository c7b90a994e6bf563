"""pytest with `--forge-run-dir` keeps what `forge-harness run` keeps; without it, it says how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from forge_harness._pytest.summary import write_summary
from forge_harness.paths import suites_dir
from forge_harness.rundir import read_record
from forge_harness.scoring import verify_run
from forge_harness.selection import shipped_files

from ..rundir_support import record_of

SOURCE = """
import os, signal, time
def mine(name, severity="high"):
    return pytest.mark.forge_check("mine." + name, title="It", severity=severity)

@mine("good")
@pytest.mark.parametrize("n", range(3))
def test_good(evidence, subject, tmp_path, n):
    evidence.equal("name", subject.name, expected="toy", reason="r")
    evidence.at_least("third", n / 3, limit=0, reason="r", samples=[0.1 * n, 1e-9])
    (tmp_path / "raw").write_text(str(n))
    evidence.artifact("raw", tmp_path / "raw")

@mine("bad")
def test_bad(evidence): evidence.at_most("x", 3, limit=2, reason="r")

@mine("raises")
def test_raises(evidence): raise OSError(5, "no")

@mine("warns", "low")
def test_warns(evidence): evidence.at_most("x", 3, limit=2, reason="r", level="warn")

@mine("skips")
def test_skips(evidence): pytest.skip("nothing here")

@pytest.mark.forge_check("mine.needs")
def test_needs_more(evidence, subject): evidence.record("x", 1)
"""


NEEDS = """
[[check]]
id = "mine.needs"
title = "It"
suite = "mine"
severity = "critical"
component = "user"
requires = ["Quantizes"]
"""


@pytest.fixture
def catalogued(pytester):
    (pytester.path / "catalogue.toml").write_text(NEEDS, encoding="utf-8")


def normalised(record):
    """A record without times, ids and the traceback's process."""
    values = record.model_dump(mode="json")
    for key in ("run_id", "started_at", "finished_at", "command", "environment"):
        values.pop(key)
    for row in [*values["checks"], *values["suites"]]:
        row.pop("duration_s")
    for check in values["checks"]:
        for item in check["items"]:
            item.pop("duration_s")
            item.pop("log")
    return values


@pytest.mark.usefixtures("catalogued")
def test_shards_are_merged_to_what_one_session_measures(session, pytester):
    for name, options in (
        ("whole", ()),
        ("one", ("--forge-shard", "1/2")),
        ("two", ("--forge-shard", "2/2", "-n", "1")),
    ):
        session(SOURCE, "--forge-run-dir", name, *options, subprocess=True)
        assert verify_run(pytester.path / name) == []
    command = [sys.executable, "-m", "forge_harness", "merge", "two", "one", "--run-dir", "merged"]
    subprocess.run(command, cwd=pytester.path, check=False, stdout=subprocess.DEVNULL)
    assert verify_run(pytester.path / "merged") == []
    merged = read_record(pytester.path / "merged")
    assert [shard.scope.shard for shard in merged.shards] == ["1/2", "2/2"]
    outcomes = {check.id: check.outcome for check in merged.checks}
    whole = read_record(pytester.path / "whole")
    for check in whole.checks:
        assert outcomes[check.id] is check.outcome
    (command,) = {check.command for check in merged.checks if check.id == "mine.good"}
    assert command.endswith("test_it.py --forge-check mine.good")
    assert "--forge-shard" not in command


@pytest.mark.usefixtures("catalogued")
def test_a_run_is_the_same_with_and_without_xdist(session, pytester):
    files = {}
    for name, options in (("plain", ()), ("two", ("-n", "2"))):
        result = session(SOURCE, "--forge-run-dir", name, *options, subprocess=True)
        assert result.ret == 1, "pytest keeps its own exit status"
        result.stdout.fnmatch_lines([f"Kept in {name}.*forge-harness gate {name}"])
        files[name] = sorted(
            path.name for path in (pytester.path / name).rglob("*") if path.is_file()
        )
        assert verify_run(pytester.path / name) == []
    plain, two = (read_record(pytester.path / name) for name in ("plain", "two"))
    assert normalised(plain) == normalised(two)
    assert files["plain"] == files["two"]
    assert {"report.html", "items.jsonl", "manifest.json"} <= set(files["plain"])
    assert (plain.state, plain.verdict, plain.subject.name) == ("finished", "FAIL", "toy")
    outcomes = {check.id: check.outcome.value for check in plain.checks if check.items}
    assert outcomes == {
        "mine.good": "pass",
        "mine.bad": "fail",
        "mine.raises": "error",
        "mine.warns": "warn",
        "mine.skips": "not_measured",
        "mine.needs": "not_measured",
    }


TEN_LINES = '''
"""Ten lines, in a directory of the user's own."""

import pytest


@pytest.mark.forge_check("speed.answer", title="The answer is fast enough", severity="high")
def test_answer(evidence, subject):
    evidence.at_most("latency", 0.02, unit="s", limit=0.05, reason="people notice 50 ms")
'''


def test_a_suite_of_ones_own_is_picked_up_and_scored(session, pytester):
    (pytester.path / "speed").mkdir()
    (pytester.path / "speed" / "test_speed.py").write_text(TEN_LINES, encoding="utf-8")
    result = session(None, "speed/test_speed.py", keep_files=True)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "Integration score 100 (at most 100), 100 % measured",
            "Verdict PARTIAL: only a selection ran*",
            "1 of * checks in scope: 1 passed, 0 failed, 0 not measured; policy sha256:*",
            "Keep this run with --forge-run-dir DIR.",
        ]
    )


CATALOGUE = """
[suite_weights]
speed = 9

[[check]]
id = "speed.answer"
title = "The answer is fast enough"
suite = "speed"
severity = "critical"
component = "user"

[[check]]
id = "speed.unwritten"
title = "Not written yet"
suite = "speed"
severity = "medium"
component = "user"
"""


def test_a_catalogue_beside_the_suite_is_the_denominator(session, pytester):
    (pytester.path / "speed").mkdir()
    bare = TEN_LINES.replace(', title="The answer is fast enough", severity="high"', "")
    (pytester.path / "speed" / "test_speed.py").write_text(bare, encoding="utf-8")
    (pytester.path / "speed" / "catalogue.toml").write_text(CATALOGUE, encoding="utf-8")
    result = session(None, "--forge-run-dir", "run", "speed/test_speed.py", keep_files=True)
    assert result.ret == 0
    record = read_record(pytester.path / "run")
    assert {check.id: check.outcome.value for check in record.checks} == {
        "speed.answer": "pass",
        "speed.unwritten": "not_measured",
    }
    # 8 of 8 + 2: the check nobody wrote counts.
    assert (record.score.low, record.score.high) == (80, 100)
    assert record.suites[0].weight == 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--forge-run-dir", "toy.py"),
            "toy.py is a file; choose a directory that is new or empty",
        ),
        (("--forge-run-dir", "."), "is not empty"),
        (("--forge-subject", "nowhere:x"), "Subject module 'nowhere' is not importable"),
        (("--forge-config", "gone.toml", "--forge-run-dir", "r"), "gone.toml"),
        (("--forge-policy", "gone.toml", "--forge-run-dir", "r"), "Cannot read gone.toml"),
        (("--forge-waivers", "gone.toml", "--forge-run-dir", "r"), "Cannot read gone.toml"),
        (("--forge-waivers", "gone.toml"), "Cannot read gone.toml"),
        # What a shell makes of a variable that is not set must not name a default.
        (("--forge-subject", "", "--forge-run-dir", "r"), "argument --forge-subject: it is empty"),
        (("--forge-run-dir", ""), "argument --forge-run-dir: it is empty"),
    ],
    ids=[
        *("file", "not_empty", "subject", "config", "policy", "waivers", "waivers_not_kept"),
        *("no_subject", "no_directory"),
    ],
)
def test_bad_options_stop_before_anything_runs(session, pytester, options, sentence):
    result = session(SOURCE, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert sentence in result.stderr.str() + result.stdout.str()
    assert "passed" not in result.stdout.str()
    assert not (pytester.path / "r").exists()


WAITS = """
import time
@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_1(evidence): evidence.record("x", 1)
@pytest.mark.forge_check("mine.b", title="It", severity="high")
def test_2(evidence): time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl_c", "killed"])
def test_an_ended_session_says_what_was_not_measured(pytester, number):
    pytester.makepyfile(toy="class Toy:\n    def pack(self): ...\n    def unpack(self): ...\n")
    pytester.makepyfile(test_it=f"import pytest\n{WAITS}")
    ini = ["-c", str(suites_dir() / "pytest.ini"), "--rootdir", str(pytester.path)]
    options = ["--forge-run-dir", "run", "--forge-subject", "toy.py:Toy", "test_it.py"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *ini, *options],
        cwd=pytester.path,
        # What a killed process leaves behind goes with the test's directory.
        env={**os.environ, "TMPDIR": str(pytester.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    items = pytester.path / "run" / "items.jsonl"
    while not (items.exists() and items.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.wait(60)
    record = read_record(pytester.path / "run")
    problems = {problem.what for problem in verify_run(pytester.path / "run")}
    if number is signal.SIGKILL:
        assert record.state == "running"
        assert "the run was not finished" in problems
    else:
        assert (record.state, record.verdict) == ("interrupted", "INCOMPLETE")
        outcomes = {check.id: check.outcome.value for check in record.checks}
        assert outcomes == {"mine.a": "pass", "mine.b": "not_measured"}
        assert problems == set()


AGAIN = {
    "while_others_finish": """
def pytest_sessionfinish(): raise KeyboardInterrupt
""",
    "while_it_is_written": """
import os, signal
from forge_harness import finish

def stopped(*given, inner=finish.finish_run):
    os.kill(os.getpid(), signal.SIGINT)
    return inner(*given)

finish.finish_run = stopped
""",
}


@pytest.mark.parametrize("when", AGAIN)
def test_another_ctrl_c_leaves_the_run_whole(session, pytester, when):
    pytester.makeconftest(AGAIN[when])
    source = WAITS.replace("time.sleep(120)", "raise KeyboardInterrupt")
    session(source, "--forge-run-dir", "run", subprocess=True)
    record = read_record(pytester.path / "run")
    assert record.state == "interrupted"
    outcomes = {check.id: check.outcome.value for check in record.checks}
    assert outcomes == {"mine.a": "pass", "mine.b": "not_measured"}
    assert verify_run(pytester.path / "run") == []


FORKS = """
import os
@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_1(evidence):
    evidence.record("x", 1)
    child = os.fork()
    assert child, "the child goes on as a session of its own"
    _, status = os.waitpid(child, 0)
    evidence.equal("status", os.waitstatus_to_exitcode(status), expected=1, reason="it is ended")
@pytest.mark.forge_check("mine.b", title="It", severity="high")
def test_2(evidence, shared_build): evidence.record("x", shared_build("n", lambda: 1))
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_a_forked_child_that_goes_on_has_no_part_in_the_run(session, pytester, options):
    session(FORKS, "--forge-run-dir", "run", *options, subprocess=True)
    record = read_record(pytester.path / "run")
    outcomes = {check.id: check.outcome.value for check in record.checks}
    assert outcomes == {"mine.a": "pass", "mine.b": "pass"}
    assert verify_run(pytester.path / "run") == []


def test_a_module_that_cannot_be_imported_is_no_interruption(session, pytester):
    pytester.makepyfile(test_bad="import gone_module")
    pytester.makepyfile(test_it=f"import pytest\n{WAITS}")
    session(None, "--forge-run-dir", "run", "test_bad.py", "test_it.py", keep_files=True)
    record = read_record(pytester.path / "run")
    assert record.state == "aborted"
    assert {check.reason for check in record.checks} == {"1 module(s) could not be collected"}


def test_what_was_only_collected_says_so(session, pytester):
    session(WAITS, "--forge-run-dir", "run", "--collect-only")
    record = read_record(pytester.path / "run")
    assert {check.reason for check in record.checks} == {"only collected (--collect-only)"}


MODULE = """
import architecture

class Toy:
    name = architecture.NAME
    def pack(self, codes): raise NameError(self.name)
    def unpack(self, packed, rows): ...
"""


def test_a_projects_own_modules_keep_their_names(pytester):
    # A suite directory is called architecture; a user's `architecture.py` is still theirs.
    pytester.makepyfile(architecture="NAME = 'theirs'", subject_file=MODULE)
    files = [str(file) for file in shipped_files(["architecture.bits_per_weight"])]
    options = ("--forge-events", "events.jsonl", "--forge-subject", "subject_file.py:Toy")
    pytester.runpytest_subprocess("-c", str(suites_dir() / "pytest.ini"), *options, *files)
    text = (pytester.path / "events.jsonl").read_text(encoding="utf-8")
    assert "NameError: theirs" in text
    assert "has no attribute" not in text


MOVES = """
@pytest.mark.forge_check("mine.moves", title="It", severity="high")
def test_moves(evidence, tmp_path, monkeypatch):
    (tmp_path / "raw").write_text("x")
    monkeypatch.chdir(tmp_path)
    evidence.artifact("raw", tmp_path / "raw")
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one_process", "worker"])
def test_a_check_that_changes_the_directory_does_not_move_its_evidence(session, pytester, options):
    session(MOVES, "--forge-run-dir", "kept", *options, subprocess=True)
    assert verify_run(pytester.path / "kept") == []
    assert len(list((pytester.path / "kept" / "evidence" / "sha256").iterdir())) == 1


def test_the_command_of_a_check_runs_it_again(session, pytester):
    session(MOVES, "--forge-run-dir", "kept", "--forge-suite=mine", subprocess=True)
    (check,) = read_record(pytester.path / "kept").checks
    words = check.command.split()
    assert words[0] == "pytest"
    assert words[-3:] == ["test_it.py", "--forge-check", "mine.moves"]
    assert not {"kept", "--forge-run-dir", "--forge-suite=mine"} & set(words)
    assert session(None, *words[1:], keep_files=True).ret == 0


@pytest.mark.parametrize(("coverage", "shown"), [(0.29, 29), (0.5799, 57), (0.58, 58), (1.0, 100)])
def test_the_share_measured_is_the_one_the_command_line_shows(coverage, shown):
    lines = []
    terminal = SimpleNamespace(
        section=lines.append, write_line=lambda text, **_: lines.append(text)
    )
    record = record_of([]).model_copy(update={"coverage": coverage})
    write_summary(terminal, SimpleNamespace(record=record, path=None))
    assert f", {shown} % measured" in lines[1]


TWICE = """
import os
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="critical")

@mine("a")
def test_second_time_fails(evidence):
    path = os.path.join(os.path.dirname(__file__), "first")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        assert False, "there is one already"
    evidence.record("x", 1)

@mine("b")
def test_good(evidence): evidence.record("x", 1)
"""


@pytest.mark.parametrize(
    "options",
    [("-n", "2", "--dist", "each"), ("--keep-duplicates", "test_it.py", "test_it.py")],
    ids=["each", "duplicates"],
)
def test_of_a_check_that_ran_twice_the_worse_result_counts(session, pytester, options):
    """The first one was kept: a failure after a pass was dropped, and the run green."""
    pytester.makepyfile(test_it=f"import pytest\n{TWICE}")
    path = pytester.path / "run"
    result = session(None, *options, "--forge-run-dir", str(path), subprocess=True, keep_files=True)
    assert result.ret != 0
    record = read_record(path)
    outcomes = {check.id: check.outcome for check in record.checks if check.suite == "mine"}
    assert outcomes == {"mine.a": "fail", "mine.b": "pass"}
    assert verify_run(path) == []


def test_a_test_of_ones_own_neither_dilutes_nor_stands_for_a_shipped_check(session, pytester):
    """99 tests that pass lifted a failing check of medium severity from 0 to 99."""
    mark = '@pytest.mark.forge_check("environment.text_encoding")\n'
    many = '@pytest.mark.parametrize("i", range(3))\n'
    source = f"{mark}{many}def test_more(evidence, i): evidence.record('x', i)"
    (shipped,) = shipped_files(["environment.text_encoding"])
    options = ("--forge-check", "environment.text_encoding", "--forge-run-dir")
    for name, files in (("beside", [str(shipped), "test_it.py"]), ("alone", ["test_it.py"])):
        session(source, *options, name, *files)
        (check,) = read_record(pytester.path / name).checks
        ended = [item.outcome for item in check.items if "test_more" in item.nodeid]
        assert ended == ["error"] * 3
        assert check.outcome == "error"
        assert len(check.items) == len(ended) + (name == "beside")


def test_a_linked_suite_directory_holds_the_shipped_checks(session, pytester):
    (pytester.path / "linked").symlink_to(suites_dir())
    (shipped,) = shipped_files(["environment.python_version"])
    options = ("--forge-check", "environment.python_version", "--forge-run-dir", "run")
    session("", *options, str("linked" / shipped.relative_to(suites_dir())))
    (check,) = read_record(pytester.path / "run").checks
    assert check.outcome == "pass", check.reason


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ((), True),
        (("--ignore", "{suites}/environment/test_files.py"), False),
        (("--ignore-glob", "{suites}/*/test_files.py"), False),
        (("--ignore", "{suites}/security"), False),
        (("--ignore", "elsewhere"), True),
    ],
)
def test_suites_of_which_a_file_is_ignored_are_a_selection(session, pytester, options, covered):
    suites = str(suites_dir())
    given = [option.format(suites=suites) for option in options]
    # What is left is not run: the scope is decided by what was given.
    collect = ("--collect-only", "--forge-run-dir", "run", "-k", "text_encoding")
    session("", *collect, *given, suites, "test_it.py")
    scope = read_record(pytester.path / "run").scope
    assert (not scope.suites) is covered
