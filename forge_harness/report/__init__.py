"""Reports of a run: HTML, Markdown, JUnit, CTRF, SARIF and JSON, all made from one `Report`."""

from forge_harness.report.build import build_report
from forge_harness.report.ctrf import render_ctrf
from forge_harness.report.html import render_html
from forge_harness.report.junit import render_junit
from forge_harness.report.markdown import render_markdown
from forge_harness.report.model import Report
from forge_harness.report.sarif import render_sarif
from forge_harness.report.write import FORMATS, write_reports

__all__ = [
    "FORMATS",
    "Report",
    "build_report",
    "render_ctrf",
    "render_html",
    "render_junit",
    "render_markdown",
    "render_sarif",
    "write_reports",
]
