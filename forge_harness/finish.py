"""Ends a run directory: final record, reports, seal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forge_harness.durable import write_durably
from forge_harness.integration.baselines import AcceptedRun
from forge_harness.integration.kept_runs import History
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.rundir import (
    DiskFullError,
    RunDirectory,
    is_full,
    read_policy,
    read_record,
)

DEFAULT_FORMATS = ("html", "md", "junit")


def finish_run(
    run_dir: Path,
    record: RunRecord,
    policy: Policy,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    baseline: AcceptedRun | None = None,
    history: History | None = None,
) -> list[Path]:
    """Writes run.json, policy.json and the reports, and seals the directory.

    The record comes first and the manifest last, so that a kill in between leaves a directory
    that does not verify. On a full disk the reports are left out: they can be made again from
    the record (`forge-harness report`), the record cannot. A report that cannot be made for
    another reason raises once the directory is sealed. Either way earlier reports stay as they
    were.

    Args:
        run_dir: Directory the run was started in.
        record: The final record.
        policy: What it was scored with.
        formats: Report formats: html, json, md, junit, ctrf, sarif.
        baseline: The run that was accepted before, which the reports compare with.
        history: The kept runs that lead up to it, which the reports show as a trend.

    Returns:
        The report files, in the order of `formats`; empty when the disk was full.

    Raises:
        RunDirectoryError: Record or manifest cannot be written.
    """
    directory = RunDirectory.open_existing(run_dir)
    directory.write_final(record, policy)
    try:
        # From the files, as whoever renders the reports again has them.
        record, policy = read_record(run_dir), read_policy(run_dir)
        return _reports(run_dir, record, policy, formats, (baseline, history))
    finally:
        # Whatever a report met, what was measured is kept and verifies.
        directory.seal()


def _reports(
    run_dir: Path,
    record: RunRecord,
    policy: Policy,
    formats: Sequence[str],
    compared: tuple[AcceptedRun | None, History | None],
) -> list[Path]:
    if not formats:
        return []
    # Matplotlib takes a second to import; a run without reports does not pay for it.
    from forge_harness.report import write_reports
    from forge_harness.report.provenance import forget, note

    baseline, history = compared
    if isinstance(baseline, RunRecord):
        # As it is written down, so that the reports can be rendered again.
        baseline = QualityCoordinator(policy).baseline_of(baseline)
    before = _before(run_dir)
    try:
        forget(run_dir, formats)
        kinds = tuple(formats)
        written = write_reports(run_dir, record, policy, kinds, baseline=baseline, history=history)
        note(run_dir, written, baseline, history)
        return written
    except Exception as error:
        # Half a report is worse than none, and its bytes are needed for the manifest; a page that
        # nothing speaks for any more would make the run look forged.
        _put_back(run_dir, before)
        if not isinstance(error, DiskFullError) and not (
            isinstance(error, OSError) and is_full(error)
        ):
            raise
    return []


def _before(run_dir: Path) -> dict[Path, bytes | None]:
    """Returns every file of a run, with its content where it is a report or says what made one."""
    from forge_harness.report.provenance import REPORTS
    from forge_harness.report.write import WRITERS

    replaced = {REPORTS, *(file for file, _ in WRITERS.values())}
    return {
        path: path.read_bytes() if path.name in replaced and path.parent == run_dir else None
        for path in run_dir.rglob("*")
        if path.is_file()
    }


def _put_back(run_dir: Path, before: dict[Path, bytes | None]) -> None:
    """Makes the files of a run those of before reports were written; those that fit no more go."""
    from forge_harness.report.provenance import REPORTS

    kept = {path: content for path, content in before.items() if content is not None}
    for path in [*run_dir.rglob("*")]:
        is_changed = path in kept and path.is_file() and path.read_bytes() != kept[path]
        if is_changed or (path.is_file() and path not in before):
            path.unlink()
    try:
        # First what made the others: without it they are none of this run's.
        for path in sorted(kept, key=lambda path: path.name != REPORTS):
            if not path.exists():
                write_durably(path, kept[path])
    except OSError:
        for path in kept:
            path.unlink(missing_ok=True)
