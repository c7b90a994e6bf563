"""The specification's figures beside ours: claimed value, where we measure it, our value."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, model_validator

from forge_harness.record import RunRecord
from forge_harness.report.model import (
    CheckRow,
    EvidenceRow,
    ScoreRow,
    SpecificationRow,
    SpecificationSection,
    State,
)
from forge_harness.report.run_values import RUN_VALUES
from forge_harness.types import Outcome

NOT_MEASURED = "not measured"
_STRICT = ConfigDict(extra="forbid", frozen=True)
STATES: dict[Outcome, State] = {
    Outcome.PASS: "pass",
    Outcome.WARN: "warn",
    Outcome.FLAKY: "warn",
    Outcome.XFAIL: "warn",
    Outcome.XPASS: "fail",
    Outcome.FAIL: "fail",
    Outcome.ERROR: "error",
    Outcome.NOT_MEASURED: "not_measured",
    Outcome.NOT_APPLICABLE: "not_applicable",
}
"""Outcome -> how it is shown."""


class SpecifiedFigure(BaseModel):
    """One figure of the specification and the one place ours comes from."""

    model_config = _STRICT

    label: str
    claimed: str
    check: str | None = None
    evidence: tuple[str, ...] = ()
    """Names of the check's evidence, `*` for any; the first that is recorded is shown."""
    suite: str | None = None
    component: str | None = None
    run: str | None = None
    reason: str | None = None
    """Why nothing measures it."""

    @model_validator(mode="after")
    def _one_source(self) -> SpecifiedFigure:
        given = [self.check, self.suite, self.component, self.run, self.reason]
        if sum(source is not None for source in given) != 1:
            raise ValueError(f"{self.label!r} needs one of check, suite, component, run, reason")
        if self.evidence and self.check is None:
            raise ValueError(f"{self.label!r} names evidence but no check")
        if self.run is not None and self.run not in RUN_VALUES:
            raise ValueError(f"{self.label!r} names run value {self.run!r}, which there is not")
        return self

    @property
    def source(self) -> str:
        """Where ours comes from, in words."""
        if self.check:
            names = " or ".join(self.evidence)
            return f"check {self.check}" + (f", evidence {names}" if names else "")
        for kind in ("suite", "component"):
            if name := getattr(self, kind):
                return f"{kind} {name}"
        return RUN_VALUES[self.run][0] if self.run else f"none: {self.reason}"


class SpecifiedSection(BaseModel):
    """One section of the specification; 0 is its summary."""

    model_config = _STRICT

    number: int
    title: str
    figure: tuple[SpecifiedFigure, ...]


@cache
def specified() -> tuple[SpecifiedSection, ...]:
    """Returns every figure of the specification, by section."""
    text = files("forge_harness.report").joinpath("specification.toml").read_text(encoding="utf-8")
    return tuple(SpecifiedSection.model_validate(table) for table in tomllib.loads(text)["section"])


def specification_sections(
    record: RunRecord,
    checks: Sequence[CheckRow],
    suites: Sequence[ScoreRow],
    components: Sequence[ScoreRow],
) -> tuple[SpecificationSection, ...]:
    """Returns the specification with our value, or *not measured*, at every figure."""
    lookup = _Lookup(record, checks, suites, components)
    return tuple(
        SpecificationSection(
            number=section.number,
            title=section.title,
            rows=tuple(lookup.row(figure) for figure in section.figure),
        )
        for section in specified()
    )


class _Lookup:
    """Finds our value of a figure."""

    def __init__(
        self,
        record: RunRecord,
        checks: Sequence[CheckRow],
        suites: Sequence[ScoreRow],
        components: Sequence[ScoreRow],
    ) -> None:
        self._record = record
        self._checks = {check.id: check for check in checks}
        self._scores = {"suite": suites, "component": components}

    def row(self, figure: SpecifiedFigure) -> SpecificationRow:
        """Returns the figure with our value."""

        def make(ours: str, state: State, anchor: str | None = None, note: str = "") -> _Row:
            return SpecificationRow(
                label=figure.label,
                claimed=figure.claimed,
                source=f"check {figure.check}" if figure.check else figure.source,
                ours=ours,
                state=state,
                anchor=anchor,
                note=note,
            )

        if figure.check:
            return self._of_check(figure, make)
        if figure.reason:
            return make(NOT_MEASURED, "not_measured", None, figure.reason)
        if figure.run:
            return make(*RUN_VALUES[figure.run][1](self._record))
        return self._of_score(figure, make)

    def _of_check(self, figure: SpecifiedFigure, make: _Make) -> SpecificationRow:
        check = self._checks.get(figure.check or "")
        if check is None:
            return make(NOT_MEASURED, "not_measured", None, f"{figure.check} is not in scope")
        state = STATES[check.outcome]
        if state in ("not_measured", "not_applicable"):
            words = check.outcome.replace("_", " ")
            return make(words, state, check.anchor, check.reason)
        evidence = _first_match(check, figure.evidence)
        if evidence is not None:
            return make(
                evidence.actual, state, evidence.anchor, _described(check, evidence, figure)
            )
        if figure.evidence:
            # An outcome is no number: a figure nobody recorded is not measured.
            note = f"{check.id}: {check.outcome}, which records no such value"
            return make(NOT_MEASURED, "not_measured", check.anchor, note)
        return make(check.outcome.replace("_", " "), state, check.anchor, _counted(check))

    def _of_score(self, figure: SpecifiedFigure, make: _Make) -> SpecificationRow:
        kind = "suite" if figure.suite else "component"
        name = figure.suite or figure.component
        row = next((row for row in self._scores[kind] if row.name == name), None)
        if row is None or not row.applicable:
            return make(NOT_MEASURED, "not_measured", None, f"no check of {name} is in scope")
        passed = sum(n for outcome, n in row.counts if STATES[outcome] == "pass")
        measured = row.measured_percent
        left_out = sum(n for outcome, n in row.counts if STATES[outcome] == "not_applicable")
        note = f"{passed} of {row.checks - left_out} checks pass, {measured} % measured"
        if left_out:
            note += f", {left_out} not applicable"
        if measured == 0:
            return make(NOT_MEASURED, "not_measured", row.anchor, note)
        ours = str(row.low) if row.low == row.high else f"{row.low} (at most {row.high})"
        return make(ours, _worst(row), row.anchor, note)


_Row = SpecificationRow
_Make = Callable[..., SpecificationRow]


def _described(check: CheckRow, evidence: EvidenceRow, figure: SpecifiedFigure) -> str:
    """Names the value that is shown, its limit, and its siblings (one a task, for example)."""
    others = [
        f"{row.name} {row.actual}"
        for row in check.evidence
        if row is not evidence and any(fnmatchcase(row.name, name) for name in figure.evidence)
    ]
    return "; ".join([f"{evidence.name}, {evidence.expected or 'recorded'}", *others])


def _first_match(check: CheckRow, names: Sequence[str]) -> EvidenceRow | None:
    for name in names:
        for evidence in check.evidence:
            if fnmatchcase(evidence.name, name):
                return evidence
    return None


def _counted(check: CheckRow) -> str:
    return f"{len(check.evidence)} values recorded"


def _worst(row: ScoreRow) -> State:
    found = {STATES[outcome] for outcome, count in row.counts if count}
    order: tuple[State, ...] = ("fail", "error", "not_measured", "warn", "pass")
    return next((state for state in order if state in found), "not_applicable")
