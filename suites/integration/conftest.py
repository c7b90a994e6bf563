"""Fixtures of the integration checks: the connector under test, golden and frozen checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge_harness.formats import ReadOptions
from forge_harness.integration import phase4_connector as connector_module
from forge_harness.paths import fixtures_dir


@pytest.fixture
def connector() -> type:
    """The connector class the checks exercise, looked up when a check runs."""
    return connector_module.Phase4Connector


@dataclass(frozen=True)
class Golden:
    """A golden checkpoint and what its maker put in."""

    name: str
    path: Path
    options: ReadOptions
    truth: dict[str, Any]


@pytest.fixture
def golden() -> list[Golden]:
    """Every golden checkpoint, made by a program that shares no code with the readers."""
    root = fixtures_dir() / "checkpoints"
    found = []
    for name, truth in json.loads((root / "truth.json").read_text(encoding="utf-8")).items():
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in truth["options"].items()}
        found.append(Golden(name, root / name / truth["open"], ReadOptions(**told), truth))
    return found


def misread(connector: type, cases: list[Golden]) -> list[str]:
    """Names golden tensors whose codes or scales are not those the maker put in."""
    wrong = []
    for case in cases:
        loaded = connector(read=case.options).load(case.path)
        if loaded.detection.format != case.truth["format"]:
            wrong.append(f"{case.name}: detected as {loaded.detection.format}")
        for name in loaded.ternary.keys() ^ case.truth["ternary"].keys():
            wrong.append(f"{case.name}: {name}")
        for name in loaded.ternary.keys() & case.truth["ternary"].keys():
            found, expected = loaded.ternary[name], case.truth["ternary"][name]
            scales = [float(scale).hex() for scale in found.scales]
            if (found.codes_sha256, scales) != (expected["codes_sha256"], expected["scales"]):
                wrong.append(f"{case.name}: {name}")
    return wrong


def settle(evidence: Any, connector: type, cases: list[Golden]) -> None:
    """Records that golden tensors were read as made."""
    tensors = sum(len(case.truth["ternary"]) for case in cases)
    evidence.record("golden_tensors", tensors, unit="tensors", reason="compared with their maker")
    wrong = misread(connector, cases)
    evidence.equal(
        "misread_tensors",
        len(wrong),
        expected=0,
        unit="tensors",
        reason=f"codes by digest and scales bit for bit as made; {'; '.join(wrong[:3])}",
    )


def measured_row(evidence: Any, connector: type, label: str) -> Any:
    """Measures one row of the compatibility matrix and records it."""
    from forge_harness.integration.compatibility import reference_cases

    cases = [case for case in reference_cases() if case.model_type == label]
    (row,) = connector().compatibility(cases)
    evidence.record("conversion", row.conversion, reason="what the format needs")
    evidence.equal(
        "codes_changed",
        row.codes_changed,
        expected=0,
        reason=f"of {row.tensors} tensors of a frozen trained model",
    )
    evidence.record("accuracy_before", row.accuracy_before, reason="as its own format defines it")
    evidence.record("accuracy_after", row.accuracy_after, reason="of the converted package")
    return row
