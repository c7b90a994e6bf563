"""Tables and colour, for people and for pipes."""

import io
import sys

from forge_harness.cli.terminal import coloured, is_plain, several, table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(monkeypatch):
    # Not a fixture: between setup and call pytest puts its own stream in place.
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")


def test_columns_align_and_numbers_go_right():
    assert table(("name", "count", "why"), [("a", 5, "x"), ("longer", 12, "")]) == (
        "name    count  why\na           5  x\nlonger     12"
    )


def test_a_pipe_gets_one_line_a_row():
    assert len(table(("a", "b"), [("x", "word " * 100)]).splitlines()) == 2


def test_a_terminal_gets_the_last_column_wrapped(monkeypatch):
    watch(monkeypatch)
    lines = table(("a", "b"), [("x", "word " * 20)]).splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith("   word") for line in lines[2:])


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    watch(monkeypatch)
    assert coloured("FAIL") == "\x1b[31m\x1b[1mFAIL\x1b[0m"
    assert coloured("unknown") == "unknown"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("FAIL") == "FAIL"
    monkeypatch.setenv("NO_COLOR", "")
    assert coloured("FAIL") != "FAIL"
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("FAIL") == "FAIL"


def test_a_pipe_is_plain(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert is_plain(sys.stdout)
    assert coloured("FAIL") == "FAIL"


def test_a_cell_writes_no_rows_of_its_own_and_moves_no_cursor():
    shown = table(("a", "b"), [("x\n     99  operator", "\x1b[2J\u202e y\r"), ("ñ 日本", 1)])
    assert len(shown.splitlines()) == 3
    assert "\\n     99  operator" in shown
    assert "\\x1b[2J\\u202e y\\r" in shown
    assert "ñ 日本" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_one_of_a_thing_is_one():
    counts = [several(count, "check") for count in (0, 1, 2, 1000)]
    assert counts == ["0 checks", "1 check", "2 checks", "1000 checks"]
    assert [several(n, "oddity", "oddities") for n in (1, 2)] == ["1 oddity", "2 oddities"]
