"""The table of `history export`: one row a run, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from forge_harness.cli.stored_runs import RefusedRun, StoredRun, StoredRuns
from forge_harness.cli.terminal import printable, shown
from forge_harness.errors import ConfigError

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula, also in full width, and what spreadsheets drop before looking for one."""

Row = dict[str, Any]


def exported(found: StoredRuns, kind: str) -> tuple[bytes, tuple[RefusedRun, ...]]:
    """Returns the bytes of the table and the runs that have no row in it.

    Args:
        found: The runs.
        kind: csv or json.
    """
    rows: list[Row] = []
    refused = list(found.refused)
    for run in found.runs:
        try:
            rows.append({**_flat(run), **_gates(run)})
        except ConfigError as error:
            refused.append(RefusedRun(run.directory, "has no gate values", str(error)))
    columns = _columns(rows)
    if kind == "csv":
        return _csv(columns, rows), tuple(refused)
    value = {
        "columns": columns,
        "rows": [{name: row.get(name) for name in columns} for row in rows],
        "refused": [run.to_json() for run in refused],
    }
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(), tuple(refused)


def described(run: StoredRun) -> Row:
    """Returns what a run is and how it ended, as JSON values."""
    from forge_harness.integration.baselines import compared_facts

    record, facts = run.record, compared_facts(run.record)
    return {
        "run_id": record.run_id,
        "directory": shown(run.directory),
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "state": record.state,
        "commit": record.environment.get("git_commit"),
        "dirty": record.environment.get("git_dirty"),
        "policy_digest": record.policy_digest,
        "profile": record.scope.profile.value,
        "selection": facts["selection"],
        "shard": record.scope.shard,
        "subject": record.subject.spec,
        "declared": facts["declared"],
        "machine_class": facts["machine class"],
        "verdict": record.verdict.value,
        "score": {"low": record.score.low, "high": record.score.high},
        "coverage": record.coverage,
    }


def _flat(run: StoredRun) -> Row:
    row = described(run)
    score = row.pop("score")
    coverage = row.pop("coverage")
    return {**row, "score_low": score["low"], "score_high": score["high"], "coverage": coverage}


def _gates(run: StoredRun) -> Row:
    """Returns the value of each gate by name and unit: values of two units are two columns.

    Raises:
        ConfigError: The run's policy has a gate without a unit.
    """
    from forge_harness.integration.quality_coordinator import QualityCoordinator

    results = QualityCoordinator(run.policy).evaluate(run.record)
    return {f"gate.{result.gate} [{result.unit}]": result.value for result in results}


def _columns(rows: list[Row]) -> list[str]:
    """Returns the columns of all rows: what a run is, then the gates by name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    gates = sorted(name for name in names if name.startswith("gate."))
    return [*(name for name in names if not name.startswith("gate.")), *gates]


def _csv(columns: list[str], rows: list[Row]) -> bytes:
    """Returns RFC 4180 in UTF-8; text is quoted, so that no other separator splits it."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\r\n")
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([[_cell(row.get(name)) for name in columns] for row in rows])
    return stream.getvalue().encode()


def _cell(value: object) -> str | int | float:
    """Returns a cell that a spreadsheet shows and does not evaluate; numbers stay numbers."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value
    text = "" if value is None else str(value)
    # Looked at before it is made printable: an escaped tab would hide what follows it.
    quote = "'" if text.lstrip(" ").startswith(_FORMULA) else ""
    return quote + printable(text)
