"""Small policies and items for the scoring tests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord, Waiver
from forge_harness.scoring import RunContext
from forge_harness.types import Outcome, Severity

WEIGHTS = {Severity.CRITICAL: 8, Severity.HIGH: 4, Severity.MEDIUM: 2, Severity.LOW: 1}


def make_policy(*checks: tuple[str, str], weights: dict[str, int] | None = None, **extra: str):
    """A policy of (id, severity) pairs; `extra` maps an id with __ for . to a predicate."""
    suites = list(dict.fromkeys(name.partition(".")[0] for name, _ in checks))
    return Policy(
        suite_weights=weights or dict.fromkeys(suites, 10),
        severity_weights=WEIGHTS,
        thresholds={},
        catalogue=tuple(
            CatalogueEntry(
                id=name,
                title=f"{name} holds",
                suite=name.partition(".")[0],
                severity=Severity(severity),
                component="QualityCoordinator",
                not_applicable=extra.get(name.replace(".", "__")),
            )
            for name, severity in checks
        ),
    )


def make_evidence(nodeid: str, name: str = "value", value: float = 1.0, **fields: object):
    defaults = {"unit": "1", "limit": None, "direction": "record", "reason": "", "samples": None}
    return EvidenceRecord(item=nodeid, name=name, value=value, **{**defaults, **fields})


def make_item(
    check: str,
    outcome: str = "pass",
    *,
    number: int = 0,
    evidence: int | list[EvidenceRecord] = 1,
    **fields: object,
) -> ItemRecord:
    nodeid = f"suites/test_{check.replace('.', '_')}.py::test[{number}]"
    if isinstance(evidence, int):
        evidence = [make_evidence(nodeid, f"value_{i}") for i in range(evidence)]
    defaults = {
        "reason": "" if outcome == "pass" else f"why {outcome}",
        "duration_s": 0.25,
        "log": f"log of {nodeid}",
        "warnings": [f"UserWarning: in {nodeid}"],
    }
    return ItemRecord(
        nodeid=nodeid,
        check=check,
        outcome=Outcome(outcome),
        evidence=evidence,
        **{**defaults, **fields},
    )


def make_context(**fields: object) -> RunContext:
    defaults = {
        "run_id": "r1",
        "subject": SubjectRecord(spec="reference", name="reference", capabilities=["Trains"]),
        "started_at": "2026-06-15T12:00:00Z",
        "finished_at": "2026-06-15T12:01:00Z",
    }
    return RunContext(**{**defaults, **fields})


def make_waiver(check: str, expires: str = "2026-12-31") -> Waiver:
    return Waiver(check=check, owner="ann", reason="known", issue="#7", expires=expires)


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders above, for tests that cannot import a neighbour under importlib mode."""
    return _builders()


def _builders() -> SimpleNamespace:
    builders: dict[str, Callable[..., object]] = {
        "policy": make_policy,
        "evidence": make_evidence,
        "item": make_item,
        "context": make_context,
        "waiver": make_waiver,
    }
    return SimpleNamespace(**builders)


@pytest.fixture(scope="session")
def maker() -> SimpleNamespace:
    """`make` for @given tests, which refuse function-scoped fixtures; it keeps no state."""
    return _builders()
