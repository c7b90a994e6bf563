"""Fixtures of the gate checks: the coordinator under test, trial runs, the quality study."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge_harness.integration import quality_coordinator as coordinator_module
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.policy import Policy
from forge_harness.protocols import LoadsData, QualityRun
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord
from forge_harness.scoring import RunContext

from .baselines import hold_baseline
from .packages import hold

TODAY = "2026-06-15"
MACHINE = {"os": "Linux", "machine": "x86_64", "cpu": "trial", "cpu_usable": 2}


@pytest.fixture
def quality_coordinator() -> type[QualityCoordinator]:
    """The coordinator class the checks exercise, looked up when a check runs."""
    return coordinator_module.QualityCoordinator


@dataclass(frozen=True)
class Gate:
    """A gate as the policy in force states it, with values on either side of its limit."""

    name: str
    direction: str
    limit: float
    unit: str

    def better(self, share: float) -> float:
        """The limit moved to the good side by a share of itself; of one, where it is zero."""
        room = share * (abs(self.limit) or 1.0)
        return self.limit + (room if self.direction == "at_least" else -room)

    def worse(self, share: float) -> float:
        """The limit moved to the bad side likewise."""
        return self.better(-share)


@pytest.fixture
def gates(policy: Policy) -> list[Gate]:
    """Every gate of the policy in force, read from its thresholds."""
    found = []
    for key, limit in sorted(policy.thresholds.items()):
        suite, _, rest = key.partition(".")
        name, _, direction = rest.partition(".")
        if suite == "gates":
            found.append(Gate(name, direction, limit, policy.units.get(f"gates.{name}", "")))
    return found


class Trial:
    """Builds small policies, items and contexts for runs that exist only in a check."""

    def policy(self, *checks: tuple[str, str], like: Policy | None = None) -> Policy:
        """A policy of (check id, severity), with the weights 8, 4, 2, 1 of forge-score/1.

        `like` lends its thresholds and units.
        """
        suites = {check.partition(".")[0]: 10 for check, _ in checks}
        return Policy.model_validate(
            {
                "suite_weights": suites,
                "severity_weights": {"critical": 8, "high": 4, "medium": 2, "low": 1},
                "thresholds": {} if like is None else dict(like.thresholds),
                "units": {} if like is None else dict(like.units),
                "catalogue": [
                    {
                        "id": check,
                        "title": check,
                        "suite": check.partition(".")[0],
                        "severity": severity,
                        "component": "QualityCoordinator",
                    }
                    for check, severity in checks
                ],
            }
        )

    def item(
        self, check: str, outcome: str = "pass", *, number: int = 0, **fields: Any
    ) -> ItemRecord:
        """An item with one record of evidence, or with `evidence=[...]`."""
        nodeid = f"trial/{check}[{number}]"
        fields.setdefault("evidence", [self.evidence("value", 1.0)])
        reason = "" if outcome == "pass" else f"trial {outcome}"
        return ItemRecord.model_validate(
            {
                "nodeid": nodeid,
                "check": check,
                "outcome": outcome,
                "reason": reason,
                "duration_s": 0.0,
                **fields,
            }
        )

    def evidence(self, name: str, value: object, unit: str = "1", **fields: Any) -> EvidenceRecord:
        """One value, without a limit unless `limit` and `direction` are given."""
        return EvidenceRecord.model_validate(
            {
                "item": "trial",
                "name": name,
                "value": value,
                "unit": unit,
                "limit": None,
                "direction": "record",
                "reason": "",
                "samples": None,
                **fields,
            }
        )

    def gate_item(self, gate: Gate, value: float, **fields: Any) -> ItemRecord:
        """The item a check of this gate leaves: its value held against the limit."""
        judged = self.evidence(
            gate.name, value, gate.unit, limit=gate.limit, direction=gate.direction
        )
        return self.item(f"gates.{gate.name}", evidence=[judged], **fields)

    def context(self, **fields: Any) -> RunContext:
        """A run of the reference subject on the trial machine."""
        subject = SubjectRecord(spec="trial", name="trial", capabilities=[])
        defaults = {
            "run_id": "trial",
            "subject": subject,
            "environment": MACHINE,
            "started_at": f"{TODAY}T12:00:00Z",
        }
        return RunContext(**{**defaults, **fields})


@pytest.fixture
def trial() -> Trial:
    """Builder of trial runs."""
    return Trial()


class Wrong:
    """Collects decisions that differ from what was expected."""

    def __init__(self) -> None:
        self.total = 0
        self.sentences: list[str] = []

    def expect(self, what: str, found: object, expected: object) -> None:
        """Counts one decision; a wrong one is kept as a sentence."""
        self.total += 1
        if found != expected:
            self.sentences.append(f"{what}: expected {expected!s}, decided {found!s}")

    def settle(self, evidence: Any, reason: str) -> None:
        """Records how many decisions were made, and that none was wrong."""
        evidence.record("decisions", self.total, reason="decisions compared with an expectation")
        shown = "; ".join(self.sentences[:3])
        evidence.equal(
            "wrong_decisions",
            len(self.sentences),
            expected=0,
            reason=f"{reason}{'; ' if shown else ''}{shown}",
        )


@pytest.fixture
def wrong() -> Wrong:
    """Ledger of expected and found decisions."""
    return Wrong()


class Study:
    """The quality study by task and arm."""

    def __init__(
        self,
        runs: Sequence[QualityRun],
        plan: Sequence[tuple[str, str, int]],
        *,
        subject: Any,
        seed: int,
        folder: Path,
    ) -> None:
        self.runs = list(runs)
        self.plan = list(plan)
        self._subject, self._seed, self._folder = subject, seed, folder
        self._rows: dict[tuple[str, str], list[QualityRun]] = defaultdict(list)
        for run in sorted(self.runs, key=lambda run: run.seed):
            self._rows[run.task, run.arm].append(run)

    @property
    def tasks(self) -> list[str]:
        """Task names, sorted."""
        return sorted({run.task for run in self.runs})

    @property
    def compared(self) -> list[str]:
        """Tasks of which the plan has full-precision runs as well, sorted."""
        planned = {task for task, arm, _ in self.plan if arm == "full"}
        return [task for task in self.tasks if task in planned]

    def require_compared(self) -> None:
        """Skips where a task is trained in ternary alone: there is nothing to hold it against."""
        alone = [task for task in self.tasks if task not in self.compared]
        if alone:
            pytest.skip(f"quality_plan has no full-precision run of {', '.join(alone)} to compare")

    def arm(self, task: str, arm: str) -> list[QualityRun]:
        """The runs of an arm, by seed."""
        return self._rows[task, arm]

    def require_complete(self, evidence: Any) -> None:
        """Records that every planned run is there once, and consistent in itself."""
        # A full-precision run brings its post-training row along.
        control = [(task, "post_training", seed) for task, arm, seed in self.plan if arm == "full"]
        have = [(run.task, run.arm, run.seed) for run in self.runs]
        off = [row for row in (*self.plan, *control) if have.count(tuple(row)) != 1]
        evidence.equal(
            "missing_runs",
            len(off),
            expected=0,
            reason=f"every planned seed counts, not the best of them; off: {off[:3]}",
        )
        wrong = [run for run in self.runs if not abs(run.accuracy - recounted(run)) <= 1e-6]
        evidence.equal(
            "miscounted_runs",
            len(wrong),
            expected=0,
            reason="accuracy is correct predictions over predictions, to 1e-6",
        )
        twins = self._twins()
        evidence.equal(
            "identical_arms",
            len(twins),
            expected=0,
            unit="pairs",
            reason=f"arms that agree in every seed were trained once: {'; '.join(twins) or 'none'}",
        )

    def _twins(self) -> list[str]:
        """Names pairs of arms with the same counts and losses in every seed."""
        found = []
        for task in self.tasks:
            said = {
                arm: [(run.seed, run.block_correct, run.loss) for run in self.arm(task, arm)]
                for arm in sorted({run.arm for run in self.runs if run.task == task})
            }
            pairs = itertools.combinations(said, 2)
            found += [f"{task}: {one} and {two}" for one, two in pairs if said[one] == said[two]]
        return found

    def hold_packages(self, evidence: Any, tasks: Sequence[str] | None = None) -> None:
        """Holds one ternary run a task against the package it shows."""
        for task in self.tasks if tasks is None else tasks:
            if runs := self.arm(task, "ternary"):
                hold(evidence, self._subject, runs, self._seed, self._folder)

    def hold_baselines(self, evidence: Any) -> None:
        """Holds one full-precision run a task against the weights it shows."""
        for task in self.tasks:
            if runs := self.arm(task, "full"):
                hold_baseline(evidence, self._subject, runs, self._seed)

    def curve(self, task: str, arm: str) -> tuple[list[int], list[float]]:
        """(steps, training loss), the mean over seeds, thinned to at most 400 points."""
        curves = [run.curve for run in self.arm(task, arm) if run.curve]
        if not curves:
            return [], []
        length = min(len(curve) for curve in curves)
        stride = -(-length // 400)
        steps = [curves[0][i][0] for i in range(0, length, stride)]
        losses = [sum(c[i][1] for c in curves) / len(curves) for i in range(0, length, stride)]
        # A diverged run ends its curve: what follows a NaN has no height to draw.
        end = next(
            (i for i, loss in enumerate(losses) if not abs(loss) < float("inf")), len(losses)
        )
        return steps[:end], losses[:end]


@pytest.fixture
def study(
    quality_study: list[QualityRun],
    subject: Any,
    forge_profile: str,
    forge_seed: int,
    tmp_path: Path,
) -> Study:
    """The quality study of the run, with the plan it is held against."""
    plan = subject.quality_plan(forge_profile)
    return Study(quality_study, plan, subject=subject, seed=forge_seed, folder=tmp_path)


def recounted(run: QualityRun) -> float:
    """Accuracy from the counts a run reports."""
    return sum(run.block_correct) / max(1, sum(run.block_size))


@pytest.fixture
def accuracy_tasks(study: Study, subject: Any) -> list[str]:
    """Tasks whose accuracy has an absolute meaning: classes, not next tokens.

    The share of right next bytes is bounded by the entropy of the text, so an absolute limit
    says nothing there. A subject that does not say what its data are is judged on all tasks.
    """
    if not isinstance(subject, LoadsData):
        return study.tasks
    return [task for task in study.tasks if subject.data_info(task).kind == "classes"]


@pytest.fixture
def limit(policy: Policy) -> Callable[[str], Mapping[str, Any]]:
    """`limit("accuracy.at_least")`: limit and unit of a gate, as keywords for `evidence`."""

    def lookup(name: str) -> Mapping[str, Any]:
        gate = name.partition(".")[0]
        return {
            "limit": policy.threshold(f"gates.{name}"),
            "unit": policy.units[f"gates.{gate}"],
        }

    return lookup
