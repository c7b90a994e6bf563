"""Writes the reports of a run into a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge_harness.durable import write_durably
from forge_harness.errors import UsageError, unknown_choice
from forge_harness.integration.baselines import AcceptedRun
from forge_harness.integration.kept_runs import History
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.report.build import build_report
from forge_harness.report.ctrf import render_ctrf
from forge_harness.report.html import render_html
from forge_harness.report.junit import render_junit
from forge_harness.report.markdown import render_markdown
from forge_harness.report.model import Report
from forge_harness.report.sarif import render_sarif


def render_json(report: Report) -> str:
    """Returns the report as JSON: the words and links of the HTML, for other tools."""
    return json.dumps(asdict(report), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


WRITERS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "html": ("report.html", render_html),
    "json": ("report.json", render_json),
    "md": ("report.md", render_markdown),
    "junit": ("junit.xml", render_junit),
    "ctrf": ("ctrf-report.json", render_ctrf),
    "sarif": ("report.sarif", render_sarif),
}
"""Format -> (file name, writer)."""
FORMATS = tuple(WRITERS)
"""Names of the report formats."""


def write_reports(
    run_dir: Path,
    record: RunRecord,
    policy: Policy,
    formats: Sequence[str] = ("html", "md", "junit"),
    *,
    baseline: AcceptedRun | None = None,
    history: History | None = None,
) -> list[Path]:
    """Writes reports of a run; the same record and policy give the same bytes.

    Args:
        run_dir: Directory that gets the files.
        record: The run.
        policy: The policy it was scored with.
        formats: Some of html, json, md, junit, ctrf, sarif.
        baseline: The run that was accepted before, when there is one.
        history: The kept runs that lead up to it, when there are any.

    Returns:
        The files, in the order of `formats`.

    Raises:
        UsageError: There is no such format.
    """
    written = []
    compared: dict[str, Any] = {"baseline": baseline, "history": history}
    # All are rendered before one is written: who is killed meanwhile leaves those of before.
    for file, text in list(render_reports(run_dir, record, policy, formats, **compared)):
        # Whole or not at all: an older report of the run stays until this one is on disk.
        write_durably(run_dir / file, text.encode())
        written.append(run_dir / file)
    return written


def render_reports(
    run_dir: Path,
    record: RunRecord,
    policy: Policy,
    formats: Sequence[str],
    *,
    baseline: AcceptedRun | None = None,
    history: History | None = None,
) -> Iterator[tuple[str, str]]:
    """Yields (file name, text) of reports; see `write_reports`, which puts them into `run_dir`."""
    for name in formats:
        if name not in WRITERS:
            raise UsageError(unknown_choice("report format", name, WRITERS))
    report = build_report(record, policy, baseline, history)
    for name in formats:
        file, render = WRITERS[name]
        if name == "html":
            # Written elsewhere, the stored files are not beside the page: no dead links.
            text = render_html(report, has_artifacts=(run_dir / "evidence").is_dir())
        else:
            text = render(report)
        yield file, text
