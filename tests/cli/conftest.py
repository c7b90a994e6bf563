"""The command line in process, and small sealed run directories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from forge_harness.canonical import sha256_hex
from forge_harness.cli import app
from forge_harness.imports import python_program
from forge_harness.integration.recording import Recording
from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord
from forge_harness.rundir import RunDirectory, read_items, read_policy, read_record
from forge_harness.scoring import RunContext, Scope, assemble, context_of
from forge_harness.types import Outcome, Profile, Severity

CHECKS = (
    ("data.alpha", "critical"),
    ("data.beta", "high"),
    ("training.gamma", "medium"),
    ("training.delta", "low"),
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Whatever CI or the developer has set must not decide what these tests see."""
    for name in list(os.environ):
        if name.startswith(("FORGE_HARNESS_", "GITHUB_")) or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Runs the command line in this process."""

    def run(*arguments: object, **options: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return run


@pytest.fixture
def forge() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [*python_program("forge_harness"), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, **options
        )

    return run


def make_policy(checks=CHECKS) -> Policy:
    return Policy(
        suite_weights={name.partition(".")[0]: 10 for name, _ in checks},
        severity_weights={"critical": 8, "high": 4, "medium": 2, "low": 1},
        thresholds={},
        catalogue=tuple(
            CatalogueEntry(
                id=name,
                title=f"{name} holds",
                suite=name.partition(".")[0],
                severity=Severity(severity),
                component="QualityCoordinator",
            )
            for name, severity in checks
        ),
    )


def make_item(
    check: str, outcome: str, stored: bytes | None = None, run: Path | None = None
) -> ItemRecord:
    nodeid = f"suites/test_x.py::test_{check.replace('.', '_')}"
    evidence = EvidenceRecord(
        item=nodeid,
        name="value",
        value=1.0,
        unit="1",
        limit=None,
        direction="record",
        reason="",
        samples=None,
    )
    records = [evidence]
    if stored is not None:
        digest = sha256_hex(stored)
        file = f"evidence/sha256/{digest}"
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes(stored)
        raw = {"name": "raw", "value": f"sha256:{digest}", "artifact": file}
        records.append(evidence.model_copy(update=raw))
    return ItemRecord(
        nodeid=nodeid,
        check=check,
        outcome=Outcome(outcome),
        reason="" if outcome == "pass" else f"why {outcome}",
        duration_s=0.25,
        evidence=records,
    )


@pytest.fixture
def run_of(tmp_path) -> Callable[..., Path]:
    """Makes a run directory: `run_of(alpha="fail")`; checks that are not named pass.

    An outcome of None leaves the check without a test; `seal=False` is a killed run. `left` are
    files beside the record, `artifacts` what a check stored.
    """
    numbers = iter(range(100))

    def build(
        state: str = "finished",
        *,
        seal: bool = True,
        checks=CHECKS,
        selection: tuple[str, ...] = (),
        left: Mapping[str, str] | None = None,
        artifacts: Mapping[str, bytes] | None = None,
        **outcomes: str | None,
    ) -> Path:
        path = tmp_path / f"run{next(numbers)}"
        recording = Recording(
            policy=make_policy(checks),
            scope=Scope(profile=Profile.QUICK, suites=selection),
            context=RunContext(
                run_id="r1",
                subject=SubjectRecord(spec="reference", name="reference", capabilities=[]),
                started_at="2026-06-15T12:00:00Z",
            ),
        )
        recording.start(path)
        for name, _ in checks:
            outcome = outcomes.get(name.partition(".")[2], "pass")
            if outcome is not None and (not selection or name.partition(".")[0] in selection):
                stored = (artifacts or {}).get(name.partition(".")[2])
                recording.add(make_item(name, outcome, stored, path))
        for file, text in (left or {}).items():
            (path / file).parent.mkdir(exist_ok=True)
            (path / file).write_text(text)
        if seal:
            recording.finish(state, "" if state == "finished" else "because")
            recording.directory.seal()
        return path

    return build


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders above, for tests that cannot import a neighbour under importlib mode."""
    return SimpleNamespace(policy=make_policy, item=make_item, checks=CHECKS)


@pytest.fixture
def measured(run_of):
    """Makes runs that say what machine they are of, under a policy that compares runs."""

    def build(cpu: str = "Xeon", **outcomes: object) -> Path:
        run = run_of(**outcomes)
        record = read_record(run)
        limits = {"baseline.score_drop.at_most": 2.0, "baseline.gate_worsening.at_most": 0.02}
        policy = read_policy(run).model_copy(update={"thresholds": limits})
        machine = {"os": "Linux", "machine": "x86_64", "cpu": cpu, "cpu_usable": 2}
        context = replace(context_of(record), environment=machine)
        directory = RunDirectory.open_existing(run)
        changed = assemble(policy, read_items(run), scope=record.scope, context=context)
        directory.write_final(changed, policy)
        directory.seal()
        return run

    return build
