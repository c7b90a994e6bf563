"""The HTML report: one file, no network, no scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from forge_harness.report.changes import SIDES
from forge_harness.report.model import CheckRow, EvidenceRow, Move, Report, State
from forge_harness.report.run_values import verdict_state
from forge_harness.report.specification import STATES
from forge_harness.report.svg import interval_bar, sparkline
from forge_harness.report.text import duration, number, percent, shorten, tail
from forge_harness.report.trend_plot import figure_line, trend_plot
from forge_harness.scoring import LISTED_CHANGES
from forge_harness.types import Outcome, Verdict

MAX_BYTES = 1_000_000
"""The page opens at once on a phone and passes every mail filter; run.json has the rest."""
SHOWN_REASONS = 5
SHOWN_CHANGES = 200
WORDS = {outcome: outcome.replace("_", " ") for outcome in Outcome} | {
    Outcome.PASS: "passed",
    Outcome.WARN: "warned",
    Outcome.FAIL: "failed",
    Outcome.XFAIL: "waived",
    Outcome.XPASS: "waiver not needed",
}
_MOVES: dict[Move, tuple[State, str]] = {
    "worse": ("fail", "worse"),
    "better": ("pass", "better"),
    "not_judged": ("not_measured", "not judged"),
    "within": ("info", "within its noise"),
}
"""How a value moved -> how that is shown; in the order of the table."""
_OPEN = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How much of each check is in the page; all of it is in run.json."""

    log_lines: int
    log_characters: int
    reason_characters: int
    rows: int
    """Evidence rows of a check that are shown, missed limits first."""
    items: int
    sparklines: bool


LEVELS = (
    Detail(
        log_lines=80,
        log_characters=8000,
        reason_characters=2000,
        rows=200,
        items=50,
        sparklines=True,
    ),
    Detail(
        log_lines=25,
        log_characters=2000,
        reason_characters=500,
        rows=25,
        items=10,
        sparklines=True,
    ),
    Detail(
        log_lines=8,
        log_characters=600,
        reason_characters=200,
        rows=4,
        items=2,
        sparklines=False,
    ),
    Detail(
        log_lines=2,
        log_characters=160,
        reason_characters=120,
        rows=0,
        items=0,
        sparklines=False,
    ),
)
"""From everything to an index; the first that fits is written."""


def render_html(report: Report, *, has_artifacts: bool = True) -> str:
    """Returns the report as one self-contained page of at most `MAX_BYTES`.

    The same report gives the same bytes. A run too large for the page keeps every check and
    says at each what is only in run.json.

    Args:
        report: What to show.
        has_artifacts: Whether `evidence/` lies beside the page, so that its files can be linked.
    """
    plots, load_plots = tuple(_plots(report)), tuple(_load_plots(report))
    page = ""
    for detail in LEVELS:
        page = _page(report, detail, (plots, load_plots), has_artifacts)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def _page(
    report: Report, detail: Detail, plots: tuple[Sequence[Markup], ...], has_artifacts: bool
) -> str:
    view = _View(report, detail)
    css, css_digest = page_css()
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            detail=detail,
            view=view,
            plots=plots[0],
            load_plots=plots[1],
            has_artifacts=has_artifacts,
            css=Markup(css),
            css_digest=css_digest,
            verdict_state=verdict_state(report.headline.verdict),
            shown_reasons=SHOWN_REASONS,
            listed_changes=LISTED_CHANGES,
            shown_changes=SHOWN_CHANGES,
            sides=[(words, getattr(report.changes, side)) for side, words in SIDES.items()],
            moved=_moved(report),
            anchors={check.anchor for check in report.checks},
            trend_breaks=[bool(p.breaks) for p in report.trend.points] if report.trend else [],
        )
    )


class _View:
    """What the page shows of each check, and where links to the rest lead."""

    def __init__(self, report: Report, detail: Detail) -> None:
        self._detail = detail
        self._rows = {check.id: self._kept(check) for check in report.checks}
        self._anchors = {row.anchor for rows in self._rows.values() for row in rows}
        self._fallback = {row.anchor: c.anchor for c in report.checks for row in c.evidence}

    def _kept(self, check: CheckRow) -> tuple[EvidenceRow, ...]:
        if len(check.evidence) <= self._detail.rows:
            return check.evidence
        ranked = sorted(check.evidence, key=lambda row: row.state in ("info", "pass"))
        kept = set(map(id, ranked[: self._detail.rows]))
        return tuple(row for row in check.evidence if id(row) in kept)

    def rows(self, check: CheckRow) -> tuple[EvidenceRow, ...]:
        """Returns the evidence rows shown."""
        return self._rows[check.id]

    def href(self, anchor: str) -> str:
        """Returns the link to an anchor, or to the check of an evidence row that is not shown."""
        target = anchor if anchor in self._anchors else self._fallback.get(anchor, anchor)
        return f"#{target}"


def _moved(report: Report) -> dict[str, Any]:
    """Returns how many values moved how, and all of them, the ones beyond their noise first."""
    values = report.changes.values
    counts = {str(move): sum(row.move == move for row in values) for move in _MOVES}
    order = list(_MOVES)
    return {**counts, "rows": sorted(values, key=lambda row: order.index(row.move))}


def _plots(report: Report) -> list[Markup]:
    if not any(task.curves for task in report.quality):
        return []
    from forge_harness.report.plots import loss_plot  # matplotlib: a second to import

    return [
        loss_plot(task, number) if task.curves else Markup("")
        for number, task in enumerate(report.quality, start=1)
    ]


def _load_plots(report: Report) -> Iterable[Markup]:
    if report.load is None or report.load.timeline is None:
        return ()
    from forge_harness.report.load_plots import load_plots  # matplotlib

    return load_plots(report.load.timeline, "load").values()


@cache
def page_environment() -> Environment:
    """Returns the templates, with autoescape and the helpers all pages use."""
    environment = Environment(
        loader=PackageLoader("forge_harness.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers: dict[str, Any] = {
        "duration": duration,
        "number": number,
        "percent": percent,
        "shorten": shorten,
        "tail": tail,
        "interval_bar": interval_bar,
        "sparkline": sparkline,
        "trend_plot": trend_plot,
        "figure_line": figure_line,
        "moves": _MOVES,
        "verdict_states": {verdict: verdict_state(verdict) for verdict in Verdict},
        "words": WORDS,
        "states": STATES,
        "opened": _OPEN,
        "outcomes": tuple(Outcome),
    }
    environment.globals.update(helpers)
    return environment


@cache
def page_css() -> tuple[str, str]:
    """Returns the style sheet of all pages, and its digest for their content security policy."""
    source = files("forge_harness.report").joinpath("templates/report.css")
    css = source.read_text(encoding="utf-8").strip()
    return css, _digest(css)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
