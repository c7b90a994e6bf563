"""The load campaign of a run, from what the load checks recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count

from forge_harness.load.timeline import PHASE_COLUMNS, SOURCE, timeline_from
from forge_harness.record import EvidenceRecord, RunRecord
from forge_harness.report.anchors import evidence_anchor
from forge_harness.report.doubts import doubts
from forge_harness.report.model import Figure, LoadPhaseRow, LoadRun
from forge_harness.report.text import clean, number, with_unit

HEADS = {
    "offered": "offered/s",
    "goodput": "right and in time/s",
    "ok": "right",
    "shed": "shed",
    "failed": "failed",
    "p50": "median",
    "p95": "p95",
    "p99": "p99",
}
_FIGURES = (
    ("performance.peak_capacity", "peak_capacity", "capacity: highest rate within the objective"),
    ("performance.latency_percentiles", "p95_limit", "p95 at base load"),
    ("performance.overload_recovery", "goodput_23x", "goodput at 23x over the peak's"),
    ("performance.overload_recovery", "goodput_50x", "goodput at 50x over the peak's"),
    ("performance.overload_recovery", "recovery_time", "recovery after 50x"),
)


_SOURCES = {
    *(source for source, _, _ in _FIGURES),
    *(f"performance.load_{name}" for name in ("1x", "5x", "10x")),
}
"""Checks whose values are shown, and those that judge a phase."""


def load_run(record: RunRecord) -> LoadRun | None:
    """Returns the load campaign; None when no check recorded one."""
    check = next((check for check in record.checks if check.id == SOURCE), None)
    rows = {} if check is None else {e.name: (e, i) for i, e in enumerate(check.evidence)}
    phases = tuple(_phases(rows))
    if not phases:
        return None
    return LoadRun(
        columns=tuple(HEADS[name] for name in PHASE_COLUMNS),
        phases=phases,
        figures=tuple(_figures(record)),
        timeline=timeline_from({name: evidence for name, (evidence, _) in rows.items()}),
        doubts=doubts(record, _SOURCES),
    )


def _phases(rows: Mapping[str, tuple[EvidenceRecord, int]]) -> Iterable[LoadPhaseRow]:
    for index in count():
        named = rows.get(f"load.{index}.phase")
        if named is None:
            return
        cells = tuple(_figure(rows.get(f"load.{index}.{name}")) for name in PHASE_COLUMNS)
        void = rows.get(f"load.{index}.void")
        yield LoadPhaseRow(
            name=clean(str(named[0].value)),
            cells=cells,
            void="" if void is None else clean(str(void[0].value)),
        )


def _figure(row: tuple[EvidenceRecord, int] | None) -> Figure | None:
    if row is None:
        return None
    evidence, position = row
    # The head of the column says what is counted.
    unit = evidence.unit if evidence.unit == "s" else "1"
    return Figure(
        text=with_unit(number(evidence.value), unit), anchor=evidence_anchor(SOURCE, position)
    )


def _figures(record: RunRecord) -> Iterable[tuple[str, Figure]]:
    checks = {check.id: check for check in record.checks}
    for source, name, label in _FIGURES:
        check = checks.get(source)
        for index, evidence in enumerate(check.evidence if check else ()):
            if evidence.name == name:
                yield (
                    label,
                    Figure(
                        text=with_unit(number(evidence.value), evidence.unit),
                        anchor=evidence_anchor(source, index),
                        # "limited by generator": then the server may serve more.
                        detail=clean(evidence.reason),
                    ),
                )
