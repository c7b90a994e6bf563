"""Numbers and foreign text as a reader sees them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.report import text
from forge_harness.report.svg import sparkline, thinned


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("a\x00b", "a\\u0000b"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("\ufffe", "\ufffd"),
        ("line\nline\ttab", "line line tab"),
    ],
)
def test_clean(raw, shown):
    assert text.clean(raw) == shown


def test_lines_are_kept_in_logs():
    assert text.clean("a\r\nb\tc\rd", lines=True) == "a\nb\tc\\u000dd"


@given(st.text(alphabet=st.characters(codec=None)))
def test_cleaned_text_is_one_line_of_valid_utf8_that_stays_as_it_is(raw):
    shown = text.clean(raw)
    shown.encode()  # raises on a lone surrogate
    assert len(shown.splitlines()) <= 1
    assert text.clean(shown) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "yes"),
        (9999, "9999"),
        (1_700_000, "1\u202f700\u202f000"),
        (0.98765432, "0.987654"),
        (3.0, "3"),
        (1e-7, "1e-07"),
        ([0.5, 2.0], "0.5 to 2"),
    ],
)
def test_number(value, shown):
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0042, "4 ms"), (0.0996, "0.1 s"), (59.96, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_duration(seconds, shown):
    assert text.duration(seconds) == shown


def test_percent_is_never_rounded_up():
    assert [text.percent(share) for share in (0.8999, 0.29, 1.0)] == [89, 29, 100]


def test_a_cut_log_says_how_much_is_missing():
    assert text.tail("a\nb\n", lines=5, characters=100) == "a\nb"
    assert text.tail("one\ntwo\nthree", lines=2, characters=100) == (
        "[4 earlier characters are in run.json]\ntwo\nthree"
    )


@pytest.mark.parametrize("values", [[1.7e308, -1.7e308, 0.0], [0.0, 5e-324], [-0.0], [1.0] * 99])
def test_any_series_can_be_drawn(values):
    assert not re.search("nan|inf", sparkline(values, "x"))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500))
def test_thinning_keeps_the_extremes(values):
    kept = thinned(values, 60)
    assert len(kept) <= 60
    assert (min(kept), max(kept)) == (min(values), max(values))
