"""Reports no run would give: what writers must put into valid documents all the same."""

from __future__ import annotations

import dataclasses
import unicodedata

from hypothesis import Phase
from hypothesis import strategies as st

from forge_harness.report import build_report
from forge_harness.report.model import BaselineRun, Changes, Trend, TrendPoint
from forge_harness.types import Outcome, Severity, Verdict

from . import support

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Not shrunk: a report is large, and takes minutes to make small."""
LONG = "x" * 100_000
WORDS = (
    "</script><script>alert(1)</script>",
    "\ud800 lone \udfff",
    "\x00\x1b[31m\x07\u2028\u202e\ufeff",
    "{0} {{1}} [click](javascript:alert(1)) [a\\](b)",
    "//evil.example/../..\\x?q#f%00",
    "\x1b[31m",
    "",
)
# Surrogates included, which are in no text by default.
TEXT = st.sampled_from(WORDS) | st.text(st.characters(codec=None), max_size=30)
TIMES = st.sampled_from(
    (
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05.25+14:00",
        "2026-01-02T03:04:05",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "1969-12-31T23:59:59Z",
        "yesterday",
        "",
    )
)
_WHOLE = build_report(support.failing_record(), support.POLICY)
# One that has items, a log and evidence; values of them are replaced.
CHECK = _WHOLE.check("architecture.weight_scale")
IDS = ("architecture.weight_scale", "state.io_errors", "data.balance")
# Without what CTRF and SARIF have no place for: an example that fails can be read.
BASE = dataclasses.replace(
    _WHOLE,
    checks=(),
    suites=(),
    components=(),
    losses=(),
    quality=(),
    specification=(),
    provenance=(),
)


def unreadable(document):
    """Yields the characters of a document that some reader could refuse, or show as others."""
    if isinstance(document, str):
        yield from (
            character
            for character in document
            if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs")
        )
    elif isinstance(document, dict | list):
        parts = [*document, *document.values()] if isinstance(document, dict) else document
        for part in parts:
            yield from unreadable(part)


def rows(row, **fields):
    return st.builds(lambda **changes: dataclasses.replace(row, **changes), **fields)


ITEMS = rows(
    CHECK.items[0],
    nodeid=TEXT,
    outcome=st.sampled_from(Outcome),
    reason=TEXT,
    duration_s=st.floats(0, 1e6),
    attempts=st.integers(1, 4),
    log=TEXT,
    warnings=st.lists(TEXT, max_size=2).map(tuple),
)
EVIDENCE = rows(
    CHECK.evidence[0],
    name=TEXT,
    actual=TEXT,
    expected=TEXT,
    reason=TEXT,
    item=TEXT,
    unit=TEXT,
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
CHECKS = rows(
    CHECK,
    id=TEXT | st.sampled_from(IDS),
    title=TEXT,
    suite=TEXT,
    component=TEXT,
    severity=st.sampled_from(Severity),
    outcome=st.sampled_from(Outcome),
    reason=TEXT,
    duration_s=st.floats(0, 1e6),
    command=TEXT,
    items=st.lists(ITEMS, max_size=3).map(tuple),
    evidence=st.lists(EVIDENCE, max_size=2).map(tuple),
)
WAIVERS = rows(
    BASE.waivers[0],
    check=TEXT | st.sampled_from(IDS),
    owner=TEXT,
    reason=TEXT,
    issue=TEXT,
    live=st.booleans(),
)
BASELINES = st.builds(
    BaselineRun,
    run_id=TEXT,
    started_at=TIMES,
    commit=TEXT,
    verdict=st.sampled_from(Verdict),
    low=st.integers(0, 100),
    high=st.integers(0, 100),
    measured_percent=st.integers(0, 100),
    acceptance=TEXT,
    outcomes=st.lists(
        st.tuples(TEXT | st.sampled_from(IDS), st.integers(1, 2), st.sampled_from(Outcome)),
        max_size=4,
    ).map(tuple),
    unscored=st.lists(TEXT, max_size=2).map(tuple),
    uncollected=st.lists(TEXT, max_size=2).map(tuple),
)
CHANGES = st.just(BASE.changes) | st.builds(
    Changes, baseline=TEXT, refusal=st.just("") | TEXT, run=BASELINES
)
POINTS = rows(
    TrendPoint(
        run_id="",
        is_this=False,
        started_at="2026-01-02T03:04:05Z",
        commit="",
        profile="quick",
        state="finished",
        verdict=Verdict.PASS,
        low=1,
        high=2,
        measured=0.5,
        failed=0,
        not_measured=0,
        duration_s=None,
        digest="",
        breaks=(),
        compares=True,
        counts=(),
    ),
    run_id=TEXT,
    duration_s=st.none() | st.floats(0, 1e6),
    digest=TEXT,
    compares=st.booleans(),
    counts=st.lists(
        st.tuples(st.sampled_from(Outcome), st.integers(1, 9)),
        max_size=4,
        unique_by=lambda pair: pair[0],
    ).map(tuple),
)
TRENDS = st.none() | st.builds(
    Trend,
    points=st.lists(POINTS, min_size=1, max_size=3).map(tuple),
    figures=st.just(()),
    left_out=st.just(()),
)
REPORTS = rows(
    BASE,
    run_id=TEXT,
    changes=CHANGES,
    trend=TRENDS,
    headline=rows(
        BASE.headline,
        verdict=st.sampled_from(Verdict),
        meaning=TEXT,
        subject=TEXT,
        policy_digest=TEXT,
        alerts=st.lists(TEXT, max_size=2).map(tuple),
        policy_changes=st.lists(TEXT, max_size=6).map(tuple),
    ),
    checks=st.lists(CHECKS, max_size=4).map(tuple),
    unscored=st.lists(ITEMS, max_size=2).map(tuple),
    uncollected=st.lists(ITEMS, max_size=2).map(tuple),
    waivers=st.lists(WAIVERS, max_size=3).map(tuple),
    execution=rows(
        BASE.execution,
        state=st.sampled_from(("running", "finished", "interrupted", "aborted")),
        part=TEXT,
        shard=TEXT,
        started_at=TIMES,
        finished_at=st.none() | TIMES,
        environment=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    ),
)
