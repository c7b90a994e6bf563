"""Reading traces, naming points, striking them."""

import shutil
import sys

import pytest

from forge_harness.drill import children, strace
from forge_harness.drill.tally import NotMeasured

from .traces import opened, synced, written

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def test_calls_are_numbered_by_name():
    text = "\n".join(
        [
            opened("/s/a", 3),
            written("/s/a", 3, b'x", \n'),
            written("/elsewhere", 4, b"y"),
            synced("/s/a", 3),
            written("/s/a", 3, b"z"),
        ]
    )
    calls = strace.parse(text)
    assert [(c.name, c.nth) for c in calls] == [
        ("openat", 1),
        ("write", 1),
        ("write", 2),
        ("fsync", 1),
        ("write", 3),
    ]
    assert calls[1].data(1) == b'x", \n'
    assert [p.nth for p in strace.points_of(calls, "/s") if p.name == "write"] == [1, 3]


def test_a_name_that_only_begins_alike_is_outside():
    calls = strace.parse("\n".join([opened("/store2/a", 3), opened("/store/a", 3)]))
    assert [c.target() for c in strace.points_of(calls, "/store")] == ["/store/a"]


def test_opening_for_reading_is_no_point():
    (call,) = strace.parse(opened("/store/a", 3, flags="O_RDONLY"))
    assert call.target() == ""


def test_what_a_program_says_is_known_by_its_descriptor():
    said, quiet = strace.parse(
        "\n".join([written("/dev/pts/0", 1, b"ack 1 2\n"), written("/s/a", 3, b"ack 9 9\n")])
    )
    assert (said.said(), quiet.said()) == ("ack 1 2\n", "")


def test_overlapping_calls_have_no_order():
    with pytest.raises(NotMeasured, match="threads"):
        strace.parse("7 fsync(3</s> <unfinished ...>\n8 fsync(3</s>) = 0")


def test_a_string_that_was_cut_off_is_not_taken_for_whole():
    with pytest.raises(NotMeasured, match="more at once"):
        strace.unescape("\\x41...")


@needs_strace
@pytest.mark.parametrize(("fault", "left"), [(strace.KILL, b""), (strace.EIO, b"failed")])
def test_a_struck_call_does_not_happen(tmp_path, fault, left):
    program = (
        "import os,sys\n"
        "handle = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "try: os.write(handle, b'first')\n"
        "except OSError: os.write(handle, b'failed')\n"
    )
    target = tmp_path / "file"
    command = [sys.executable, "-S", "-B", "-c", program, str(target)]
    calls = strace.record(command, tmp_path / "trace")
    assert target.read_bytes() == b"first"
    (point,) = [p for p in strace.points_of(calls, tmp_path) if p.name == "write"]
    target.unlink()
    assert strace.strike(command, point, fault, tmp_path / "trace") is not None
    assert target.read_bytes() == left


@needs_strace
def test_a_point_that_is_not_reached_is_not_a_trial(tmp_path):
    call = strace.Call("fsync", 50, (), 0, failed=False)
    command = [sys.executable, "-S", "-B", "-c", "pass"]
    assert strace.strike(command, call, strace.KILL, tmp_path / "trace") is None


def test_children_run_the_interpreter_itself():
    command = children.program("storage_writer", "/s")
    assert "-S" in command
    assert command[0] == __import__("os").path.realpath(command[0])
