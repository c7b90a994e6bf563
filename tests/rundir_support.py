"""A run of two checks, for the tests of what is done with a run directory."""

from __future__ import annotations

from forge_harness.policy import Policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord
from forge_harness.rundir import RunDirectory
from forge_harness.scoring import RunContext, Scope, assemble
from forge_harness.types import Outcome

POLICY = Policy.model_validate(
    {
        "suite_weights": {"a": 1},
        "severity_weights": {"critical": 8, "high": 4, "medium": 2, "low": 1},
        "thresholds": {},
        "catalogue": [
            {"id": f"a.{n}", "title": n, "suite": "a", "severity": "high", "component": "c"}
            for n in ("x", "y")
        ],
    }
)
CONTEXT = RunContext(
    run_id="r1",
    subject=SubjectRecord(spec="toy", name="toy", capabilities=["Packs"]),
    started_at="2026-01-02T03:04:05Z",
)


def make_item(name="x", size=1):
    nodeid = f"t.py::{name}"
    evidence = EvidenceRecord(
        item=nodeid,
        name="v",
        value=1.5,
        unit="s",
        limit=2.0,
        direction="at_most",
        reason="r" * size,
        samples=[0.25] * 8,
    )
    return ItemRecord(
        nodeid=nodeid,
        check=f"a.{name}",
        outcome=Outcome.PASS,
        reason="",
        duration_s=0.5,
        evidence=[evidence],
    )


def record_of(items, state="finished"):
    return assemble(POLICY, items, scope=Scope(), context=CONTEXT, state=state)


def start(path):
    return RunDirectory.create(path, record=record_of([], "running"), policy=POLICY)
