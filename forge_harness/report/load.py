"""A load run as a section of a page, and as a page of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from forge_harness.durable import write_durably
from forge_harness.load.percentiles import milliseconds
from forge_harness.load.report import LoadReport, peak_text, recovery_text, short
from forge_harness.load.timeline import timeline_of
from forge_harness.report.figures import standalone
from forge_harness.report.html import page_css, page_environment
from forge_harness.report.model import State

PAGE = "load.html"
_STATES: dict[str, State] = {
    "PASS": "pass",
    "FAIL": "fail",
    "INCOMPLETE": "not_measured",
    "INVALID": "error",
}
_MEANINGS = {
    "PASS": "Every gate was measured and holds",
    "FAIL": "A gate does not hold",
    "INCOMPLETE": "A gate was not measured",
    "INVALID": "The load was not what was asked for, so nothing was measured",
}
_CLASSES = ("ok", "shed", "error", "timeout", "dropped", "censored")


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a template shows of a load run.

    Attributes:
        report: The run.
        plots: Name -> inline SVG.
        prefix: Of ids, when a page shows several runs.
    """

    report: LoadReport
    plots: dict[str, Markup]
    prefix: str


def load_view(report: LoadReport, prefix: str = "load") -> LoadView:
    """Returns a run with its plots drawn."""
    from forge_harness.report.load_plots import load_plots  # matplotlib: a second to import

    return LoadView(
        report, load_plots(timeline_of(report), prefix) if report.windows else {}, prefix
    )


def load_section(view: LoadView) -> Markup:
    """Returns the run as a section for a page with the report's style sheet and icons."""
    return Markup(_render("load_section.html.j2", view))


def load_page(view: LoadView) -> str:
    """Returns the run as one self-contained page: no network, no scripts, light and dark."""
    return _render("load.html.j2", view)


def write_load_report(directory: Path, report: LoadReport) -> list[Path]:
    """Writes load.html and the plots as SVG files, and returns their paths."""
    view = load_view(report)
    contents = {PAGE: load_page(view)}
    contents |= {f"load-{name}.svg": standalone(svg) for name, svg in view.plots.items()}
    for name, content in contents.items():
        write_durably(directory / name, content.encode())
    return [directory / name for name in contents]


def _render(template: str, view: LoadView) -> str:
    css, digest = page_css()
    return (
        page_environment()
        .get_template(template)
        .render(
            view=view,
            load=view.report,
            load_state=_STATES[view.report.verdict],
            load_meaning=_MEANINGS[view.report.verdict],
            classes=_CLASSES,
            short=short,
            milliseconds=milliseconds,
            recovery_text=recovery_text,
            peak_text=peak_text,
            css=Markup(css),
            css_digest=digest,
        )
    )
