"""The reports in a run directory, held against the record they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forge_harness.cli.terminal import printable

if TYPE_CHECKING:
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord
    from forge_harness.report.provenance import RenderedAgain


def rendered_again(directory: Path, record: RunRecord, policy: Policy) -> RenderedAgain:
    """Renders the reports of a verified run again, from the record that was recomputed."""
    # Drawing takes a second to import, and a run may have no report.
    from forge_harness.report.provenance import render_again

    return render_again(directory, record, policy)


def unverified_lines(directory: Path, reports: RenderedAgain) -> list[str]:
    """Returns a sentence for each report of which nothing can be said here."""
    return [
        f"Not verified: {file}, {printable(why)}; rendered here it has other bytes. "
        f"`forge-harness report {printable(str(directory))}` makes it anew."
        for file, why in reports.unknown.items()
    ]
