"""`forge-harness drill storage` as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from forge_harness.cli.drill import drill_group
from forge_harness.errors import UsageError

STORAGE = ["storage", "--quick", "--quiet"]


def invoke(*arguments):
    return CliRunner().invoke(drill_group, [*STORAGE, *arguments], standalone_mode=False)


def test_a_table_and_a_file(tmp_path):
    file = tmp_path / "found.json"
    done = invoke("--campaign", "bit_flips", "--trials", "20", "--seed", "4", "--json", str(file))
    assert done.return_value == 0, done.output
    assert "bit_flips" in done.output
    document = json.loads(file.read_bytes())
    assert document["schema_version"] == "forge-drill-storage/1"
    (campaign,) = document["campaigns"]
    assert (campaign["trials"], campaign["seed"], campaign["silent"]) == (20, 4, 0)


def test_a_store_that_loses_something_fails():
    opener = "forge_harness.drill.store_mutants:no_check"
    done = invoke("--campaign", "bit_flips", "--opener", opener)
    assert done.return_value == 1
    assert "silent" in done.output


def test_what_was_not_measured_is_not_passed(monkeypatch):
    monkeypatch.setattr("forge_harness.drill.strace._problem", lambda: "no strace here")
    done = invoke("--campaign", "kill")
    assert done.return_value == 7
    assert "kill: no strace here" in done.output


def test_a_store_of_the_working_directory_leaves_the_library_alone(tmp_path):
    """Its children took the `types.py` beside it for the standard library's."""
    (tmp_path / "types.py").write_text("raise SystemExit('not the library')")
    (tmp_path / "mine.py").write_text(
        "from forge_harness.state import Store\n"
        "def start(root, **options):\n    return Store.open(root, **options)\n"
        "def here(root, **options):\n    import sys\n"
        "    assert 'storage_writer' not in ' '.join(sys.orig_argv)\n"
        "    return Store.open(root, **options)\n"
    )
    program = "import sys; from forge_harness.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-P", "-c", program, "drill", *STORAGE, "--campaign", "writers"]
    command += ["--trials", "1", "--opener"]
    done = [
        subprocess.run([*command, f"mine:{name}"], cwd=tmp_path, capture_output=True, text=True)
        for name in ("start", "here")
    ]
    assert [each.returncode for each in done] == [0, 4], done
    assert "makes no store that takes a commit in a fresh process: AssertionError" in done[1].stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--campaign", "kil"), "Did you mean 'kill'"),
        (("--opener", "x:y"), "cannot be imported"),
        (("--opener", "os:path"), "'os:path' is a module"),
        (("--opener", "os:sep"), "'os:sep' is a str"),
        (("--opener", "json:loads"), "raised TypeError where a new store was to be made"),
    ],
)
def test_wrong_names_are_refused(arguments, said):
    error = invoke(*arguments).exception
    assert isinstance(error, UsageError)
    assert said in str(error)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("forge_harness.drill.storage.run_storage", pytest.fail)
    error = invoke("--json", str(tmp_path)).exception
    assert isinstance(error, IsADirectoryError)


def test_an_interrupted_drill_is_shown_and_kept(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("forge_harness.drill.contention.kill_writers", interrupted)
    file = tmp_path / "found.json"
    names = ("newer_schema", "writers", "swaps")
    chosen = [word for name in names for word in ("--campaign", name)]
    done = invoke(*chosen, "--json", str(file))
    assert isinstance(done.exception, click.Abort)
    assert "Not complete: 2 of 3 campaigns had not ended.\nnot measured (" in done.output
    document = json.loads(file.read_bytes())
    assert (document["is_complete"], document["status"]) == (False, "not measured")
    assert [row["status"] for row in document["campaigns"]] == ["held", *["not measured"] * 2]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a directory in memory")
def test_a_stop_signal_leaves_nothing_behind():
    """A cancelled job left its directory in memory, and disks mounted that nobody could see."""
    command = [sys.executable, "-m", "forge_harness", "drill", *STORAGE, "--campaign", "writers"]
    before = set(Path("/dev/shm").glob("forge-drill-*"))
    with subprocess.Popen(
        [*command, "--trials", "1000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as drill:
        deadline, own = time.monotonic() + 60, []
        while not own and time.monotonic() < deadline:
            made = set(Path("/dev/shm").glob("forge-drill-*")) - before
            own = [path for path in made if (path / "store" / "index.db").exists()]
            time.sleep(0.05)
        drill.send_signal(signal.SIGTERM)
        said, _ = drill.communicate(timeout=60)
    assert (drill.returncode, own != []) == (2, True), said
    # Others may be drilling beside this test; their directories stay.
    assert not all(path.exists() for path in own)
