"""Full precision against ternary against post-training, from what the quality gates recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forge_harness.record import EvidenceRecord, RunRecord
from forge_harness.report.anchors import evidence_anchor
from forge_harness.report.model import ArmRow, Curve, Figure, QualityTask
from forge_harness.report.text import clean, number, with_unit

ARMS = {
    "full": "full precision",
    "ternary": "ternary (trained)",
    "post_training": "post-training ternary",
}
SOURCES = ("gates.quantized_accuracy_ratio", "gates.accuracy", "gates.compression_ratio")
"""Checks whose evidence is read, the first that has a name wins."""
_PER_ARM = {
    "accuracy": "accuracy",
    "loss": "held-out loss",
    "steps": "steps",
    "learning_rate": "learning rate",
    "seeds": "seeds",
}
_PER_TASK = {
    "ratio": "ternary over full-precision accuracy",
    "loss_ratio": "ternary over full-precision loss",
    "control_ratio": "post-training over full-precision accuracy",
    "compression_ratio": "fp32 bytes over package bytes",
    "package_bytes": "package size",
}
_CURVE, _CURVE_STEPS = "loss_curve", "loss_curve_steps"


@dataclass(frozen=True, slots=True)
class _Found:
    evidence: EvidenceRecord
    anchor: str


def quality_tasks(record: RunRecord) -> tuple[QualityTask, ...]:
    """Returns one table a task, in the order the tasks were recorded; none without evidence."""
    found = _by_name(record)
    tasks = dict.fromkeys(
        parts[1]
        for parts in (name.split(".") for name in found)
        if len(parts) == 3 and parts[0] in _PER_ARM and parts[2] in ARMS
    )
    return tuple(_task(task, found) for task in tasks)


def _by_name(record: RunRecord) -> dict[str, _Found]:
    checks = {check.id: check for check in record.checks}
    found: dict[str, _Found] = {}
    for source in SOURCES:
        check = checks.get(source)
        for index, evidence in enumerate(check.evidence if check else ()):
            found.setdefault(evidence.name, _Found(evidence, evidence_anchor(source, index)))
    return found


def _task(task: str, found: Mapping[str, _Found]) -> QualityTask:
    arms = [arm for arm in ARMS if any(f"{kind}.{task}.{arm}" in found for kind in _PER_ARM)]
    rows = tuple(
        ArmRow(
            arm=ARMS[arm],
            cells=tuple(_figure(found.get(f"{kind}.{task}.{arm}")) for kind in _PER_ARM),
        )
        for arm in arms
    )
    return QualityTask(
        task=clean(task),
        columns=tuple(_PER_ARM.values()),
        arms=rows,
        comparisons=tuple(_comparisons(task, found)),
        curves=tuple(_curves(task, found)),
    )


def _comparisons(task: str, found: Mapping[str, _Found]) -> Iterable[tuple[str, Figure]]:
    for kind, label in _PER_TASK.items():
        row = found.get(f"{kind}.{task}")
        if row is None:
            continue
        ends = [found.get(f"{kind}_{end}.{task}") for end in ("low", "high")]
        known = [end.evidence.value for end in ends if end is not None]
        detail = ""
        if len(known) == 2:
            detail = f"95 %: {number(known[0])} to {number(known[1])}"
        elif known:
            detail = f"95 %: {'at least' if ends[0] else 'at most'} {number(known[0])}"
        yield label, Figure(text=_shown(row.evidence), anchor=row.anchor, detail=detail)


def _figure(row: _Found | None) -> Figure | None:
    if row is None:
        return None
    # The values of `seeds` are names, not a sample.
    samples = [] if row.evidence.name.startswith("seeds.") else row.evidence.samples or []
    return Figure(text=_shown(row.evidence), anchor=row.anchor, detail=_interval(samples))


def _interval(samples: list[float]) -> str:
    if len(samples) < 2:
        return "one seed, no interval" if samples else ""
    from forge_harness.scoring.statistics import mean_interval  # scipy: half a second

    interval = mean_interval(samples)
    # Digits beyond the fourth are noise at three to ten seeds.
    return f"95 %: {interval.low:.4g} to {interval.high:.4g}, n = {len(samples)}"


def _shown(evidence: EvidenceRecord) -> str:
    # The column says "steps" already.
    unit = "1" if evidence.name.startswith("steps.") else evidence.unit
    return with_unit(number(evidence.value), unit)


def _curves(task: str, found: Mapping[str, _Found]) -> Iterable[Curve]:
    for arm, label in ARMS.items():
        losses = found.get(f"{_CURVE}.{task}.{arm}")
        if losses is None or not losses.evidence.samples:
            continue
        values = tuple(losses.evidence.samples)
        steps = found.get(f"{_CURVE_STEPS}.{task}.{arm}")
        recorded = tuple(steps.evidence.samples or ()) if steps else ()
        # Without steps of the same length the points are numbered: the shape is still there.
        axis = recorded if len(recorded) == len(values) else tuple(map(float, range(len(values))))
        yield Curve(arm=label, anchor=losses.anchor, steps=axis, losses=values)
