"""Reading traces, naming points, striking them."""

import importlib.util
import py_compile
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
    assert strace.strike(command, point, fault, tmp_path / "trace", tmp_path) is not None
    assert target.read_bytes() == left


@needs_strace
def test_a_point_that_is_not_reached_is_not_a_trial(tmp_path):
    call = strace.Call("fsync", 50, (), 0, failed=False, order=1)
    command = [sys.executable, "-S", "-B", "-c", "pass"]
    assert strace.strike(command, call, strace.KILL, tmp_path / "trace", tmp_path) is None


_OPENS_BEFORE = """
import os, sys
for name in os.listdir(sys.argv[2]): os.close(os.open(os.path.join(sys.argv[2], name), os.O_RDONLY))
for name in "ab": os.close(os.open(os.path.join(sys.argv[1], name), os.O_CREAT | os.O_WRONLY))
"""


@needs_strace
@pytest.mark.parametrize("fault", [strace.KILL, strace.EIO, strace.FULL])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_program_that_opens_more_or_less_before_is_struck_at_the_same_point(
    tmp_path, fault, order, change
):
    """As an interpreter does once another process has written the byte code it lacked."""
    store, aside, trace = tmp_path / "store", tmp_path / "aside", tmp_path / "trace"
    aside.mkdir()
    for number in range(3):
        (aside / str(number)).touch()
    command = [sys.executable, "-S", "-B", "-c", _OPENS_BEFORE, str(store), str(aside)]

    def fresh():
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()

    def points():
        fresh()
        return strace.points_of(strace.record(command, trace), store)

    def strike(point):
        fresh()
        return strace.strike(command, point, fault, trace, store)

    point = points()[order - 1]
    assert (point.name, point.order) == ("openat", order)
    (aside / "2").unlink() if change < 0 else (aside / "3").touch()
    assert strike(point) is None
    assert strace.aimed(point, strike, points) is not None
    assert [path.name for path in store.iterdir()] == ["a"][: order - 1]


@needs_strace
def test_a_point_that_never_comes_again_ends_the_search(tmp_path):
    point = strace.Call("fsync", 1, (), 0, failed=False, order=1)
    tried = []
    assert strace.aimed(point, tried.append, lambda: []) is None
    assert tried == [point]
    tried.clear()
    assert strace.aimed(point, tried.append, lambda: [point]) is None
    assert len(tried) == 5


@needs_strace
def test_byte_code_that_others_write_meanwhile_changes_no_number(tmp_path):
    module = tmp_path / "imported_by_the_program.py"
    module.write_text("VALUE = 1\n")
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import imported_by_the_program\n"
        "os.close(os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY))\n"
    )
    (store := tmp_path / "store").mkdir()
    plain = [sys.executable, "-S", "-B", "-c", program, str(tmp_path), str(store / "file")]
    cached = children.cached_in(plain, tmp_path / "byte code")
    children.fill_cache(cached)

    def number(command):
        (store / "file").unlink(missing_ok=True)
        (point,) = strace.points_of(strace.record(command, tmp_path / "trace"), store)
        return point.nth

    before = number(plain), number(cached)
    py_compile.compile(str(module), cfile=importlib.util.cache_from_source(module))
    after = number(plain), number(cached)
    assert after[0] == before[0] - 1
    assert after[1] == before[1]


def test_children_run_the_interpreter_itself():
    command = children.program("storage_writer", "/s")
    assert "-S" in command
    assert command[0] == __import__("os").path.realpath(command[0])
