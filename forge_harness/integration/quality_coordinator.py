"""QualityCoordinator: gates, waivers, baselines and the verdict.

A gate is a threshold of the policy with its unit. A value passes only when it is a finite number
in the threshold's unit and on the right side of the limit, the limit itself included; what is
missing is not measured, and nothing else than PASS is green.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.evidence import plain
from forge_harness.integration.baselines import (
    Acceptance,
    AcceptedRun,
    Baseline,
    baseline_of,
    not_comparable,
)
from forge_harness.policy import Policy
from forge_harness.record import CheckRecord, EvidenceRecord, ItemRecord, RunRecord, Waiver
from forge_harness.scoring import RunContext, Scope, assemble, reassemble
from forge_harness.scoring.assembly import RunState, ScopeLike
from forge_harness.types import Direction, Outcome, Verdict

GATE_SUITE = "gates"
_BASELINE_DROP = "baseline.score_drop.at_most"
_BASELINE_WORSENING = "baseline.gate_worsening.at_most"
_WORST_FIRST = (Outcome.FAIL, Outcome.ERROR, Outcome.NOT_MEASURED, Outcome.PASS)
_TIMES = ("s",)
"""Units of wall clock. Where jobs differ by 8 % (one standard deviation), one comparison in three
is 5 % off with nothing changed; ratios within one run are what the performance suite has."""
_NON_FINITE = ("nan", "inf", "-inf")
"""How evidence writes them, JSON having no word for them."""
_PASSING = (Verdict.PASS, Verdict.PASS_WITH_WARNINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimit:
    """One side a gate's value must keep to."""

    direction: Direction
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """How one gate ended: pass, fail, error (unusable value) or not_measured (no value)."""

    gate: str
    outcome: Outcome
    value: float | None
    unit: str
    """Unit of the threshold."""
    limits: tuple[GateLimit, ...]
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the gate is green; only a measured value on the right side is."""
        return self.outcome is Outcome.PASS


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineComparison:
    """What changed against the baseline; no rows when the two do not compare."""

    comparable: bool
    reason: str
    """Why the two runs do not compare; empty when they do."""
    rows: tuple[GateResult, ...] = ()
    lost: tuple[GateResult, ...] = ()
    """Rows that are not measured and that the baseline has a value of; times are left out."""

    @property
    def regressions(self) -> tuple[GateResult, ...]:
        """What got worse beyond its tolerance."""
        return tuple(row for row in self.rows if row.outcome in (Outcome.FAIL, Outcome.ERROR))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A verdict, why, and the record it was computed on."""

    verdict: Verdict
    reasons: tuple[str, ...]
    record: RunRecord


GateValues = Mapping[str, tuple[object, str]]
"""Gate name -> (value, unit)."""


class QualityCoordinator:
    """Decides gates and verdicts under one policy.

    Args:
        policy: Thresholds with their units, catalogue and weights.
        waivers: The ledger in force; None leaves a record's own ledger in force.
        baseline: The run that was accepted before, as its record or as read from a file, or None.
    """

    def __init__(
        self,
        policy: Policy,
        waivers: Sequence[Waiver] | None = None,
        baseline: AcceptedRun | None = None,
    ) -> None:
        self.policy = policy
        self.waivers = waivers
        self.baseline = baseline

    def gates(self) -> tuple[str, ...]:
        """Returns the names of the policy's gates, sorted.

        Raises:
            ConfigError: A threshold among those of the gates is no limit of one.
        """
        return tuple(sorted(self._all_limits()))

    def evaluate_gate(self, name: str, value: object, unit: str = "1") -> GateResult:
        """Decides one gate.

        Args:
            name: Gate name, as in `[thresholds.gates]`.
            value: The measured number; None when there is none.
            unit: Unit of `value`. Another unit than the threshold's is refused, not converted.

        Raises:
            ConfigError: The policy has no such gate, or its threshold has no unit.
        """
        limits, expected = self._limits(name), self._unit(name)
        outcome, number, reason = _judge(name, value, unit, expected, limits)
        return GateResult(
            gate=name, outcome=outcome, value=number, unit=expected, limits=limits, reason=reason
        )

    def evaluate(
        self, evidence: RunRecord | Sequence[EvidenceRecord] | GateValues
    ) -> list[GateResult]:
        """Decides every gate of the policy, sorted by name; a gate without a value is listed too.

        Args:
            evidence: A run (gate G reads the evidence named G of check `gates.G`; a gate is
                never greener than its check, and evidence of another policy is stale), or
                evidence records named as the gates (several of one gate: the worst counts,
                nothing is averaged), or gate name -> (value, unit).

        Raises:
            ConfigError: A mapping names a gate the policy does not have.
        """
        if isinstance(evidence, RunRecord):
            return [self._of_record(name, evidence) for name in self.gates()]
        if isinstance(evidence, Mapping):
            for name in evidence:
                self._limits(name)
            rows = {name: [pair] for name, pair in evidence.items()}
        else:
            rows = _by_gate(evidence)
        return [self._worst(name, rows.get(name, [])) for name in self.gates()]

    def assemble(
        self,
        items: Sequence[ItemRecord],
        *,
        context: RunContext,
        scope: ScopeLike | None = None,
        state: RunState = "finished",
    ) -> RunRecord:
        """Returns the scored record of items under this policy and ledger."""
        return assemble(
            self.policy,
            items,
            waivers=self.waivers or (),
            scope=scope or Scope(),
            context=context,
            state=state,
        )

    def compare_baseline(
        self, record: RunRecord, baseline: AcceptedRun | None = None
    ) -> BaselineComparison:
        """Compares a run with the baseline, gate by gate and by score.

        Runs of another machine class, policy, subject or scope are refused, never adjusted. Times
        are shown and not judged.

        Args:
            record: The run that is judged.
            baseline: What it is held against; the constructor's baseline when None.
        """
        accepted = self.baseline if baseline is None else baseline
        if accepted is None:
            return BaselineComparison(comparable=False, reason="there is no baseline")
        if isinstance(accepted, RunRecord):
            accepted = self.baseline_of(accepted)
        refusal = not_comparable(record, accepted)
        if refusal:
            return BaselineComparison(comparable=False, reason=refusal)
        rows = [self._score_row(record, accepted)]
        rows += [
            self._against(
                self._as_accepted(result, record, accepted), accepted.gates.get(result.gate)
            )
            for result in self.evaluate(record)
        ]
        lost = [
            row
            for row in rows
            if row.outcome is Outcome.NOT_MEASURED
            and row.gate in accepted.gates
            and row.unit not in _TIMES
        ]
        return BaselineComparison(comparable=True, reason="", rows=tuple(rows), lost=tuple(lost))

    def baseline_of(self, record: RunRecord, acceptance: Acceptance | None = None) -> Baseline:
        """Returns what of a run later ones are held against.

        Args:
            record: A verified run of this policy; of another one no gate has a value.
            acceptance: Who accepted it, for a file.
        """
        results = self.evaluate(record)
        values = {result.gate: result.value for result in results if result.value is not None}
        return baseline_of(record, values, acceptance)

    def verdict(self, record: RunRecord) -> Decision:
        """Returns the verdict on a run, computed anew from its items and evidence.

        A baseline that does not compare, and evidence of another policy, leave it INCOMPLETE.
        """
        again = reassemble(record, self.policy, waivers=self.waivers)
        verdict, reasons = again.verdict, list(again.verdict_reasons)
        open_ends = []
        if record.policy_digest != self.policy.digest:
            open_ends.append(_stale(record))
        elif self.baseline is not None:
            comparison = self.compare_baseline(again)
            if comparison.regressions:
                lost = [row.reason for row in comparison.regressions]
                return Decision(verdict=Verdict.FAIL, reasons=(*lost, *reasons), record=again)
            if not comparison.comparable:
                open_ends.append(f"the baseline does not compare: {comparison.reason}")
            open_ends += [row.reason for row in comparison.lost]
        if open_ends and verdict in _PASSING:
            verdict = Verdict.INCOMPLETE
        return Decision(verdict=verdict, reasons=(*open_ends, *reasons), record=again)

    def _limits(self, name: str) -> tuple[GateLimit, ...]:
        found = self._all_limits()
        if name not in found:
            raise ConfigError(unknown_choice("gate", name, found), key=f"{GATE_SUITE}.{name}")
        return tuple(found[name])

    def _all_limits(self) -> dict[str, list[GateLimit]]:
        found: dict[str, list[GateLimit]] = {}
        for key, limit in sorted(self.policy.thresholds.items()):
            if key.partition(".")[0] == GATE_SUITE:
                gate, direction = _gate_and_side(key)
                found.setdefault(gate, []).append(GateLimit(direction=direction, limit=limit))
        return found

    def _unit(self, name: str) -> str:
        key = f"{GATE_SUITE}.{name}"
        if key not in self.policy.units:
            raise ConfigError(f"Gate {name!r} has no unit; add it to [units.gates].", key=key)
        return self.policy.units[key]

    def _of_record(self, name: str, record: RunRecord) -> GateResult:
        check = next((c for c in record.checks if c.id == f"{GATE_SUITE}.{name}"), None)
        if record.policy_digest != self.policy.digest:
            return self._unmeasured(name, _stale(record))
        if check is None or check.outcome is Outcome.NOT_APPLICABLE:
            return self._unmeasured(name, f"check {GATE_SUITE}.{name} is not part of the run")
        result = self._worst(name, _by_gate(check.evidence).get(name, []))
        return _no_greener_than(check, result)

    def _worst(self, name: str, rows: Sequence[tuple[object, str]]) -> GateResult:
        results = [self.evaluate_gate(name, value, unit) for value, unit in rows]
        results = results or [self.evaluate_gate(name, None)]
        return min(results, key=lambda r: (_WORST_FIRST.index(r.outcome), _room(r)))

    def _unmeasured(self, name: str, reason: str) -> GateResult:
        return GateResult(
            gate=name,
            outcome=Outcome.NOT_MEASURED,
            value=None,
            unit=self._unit(name),
            limits=self._limits(name),
            reason=reason,
        )

    def _score_row(self, record: RunRecord, baseline: Baseline) -> GateResult:
        allowed = self.policy.threshold(_BASELINE_DROP)
        floor = baseline.score.low - allowed
        dropped = record.score.low < floor
        reason = (
            f"the score fell from {baseline.score.low} to {record.score.low}; "
            f"{allowed:g} points are allowed"
        )
        return GateResult(
            gate="score",
            outcome=Outcome.FAIL if dropped else Outcome.PASS,
            value=float(record.score.low),
            unit="points",
            limits=(GateLimit(direction=Direction.AT_LEAST, limit=floor),),
            reason=reason if dropped else "",
        )

    def _as_accepted(self, result: GateResult, record: RunRecord, baseline: Baseline) -> GateResult:
        """Returns a gate by its value alone where its check is waived, or ended so before."""
        name = f"{GATE_SUITE}.{result.gate}"
        now = next((check.outcome for check in record.checks if check.id == name), None)
        then = baseline.checks.get(name)
        is_accepted = now is Outcome.XFAIL or (then is not None and then.outcome is now)
        if result.value is None or not is_accepted:
            return result
        return self.evaluate_gate(result.gate, result.value, result.unit)

    def _against(self, now: GateResult, then: float | None) -> GateResult:
        """Judges one gate's value by the baseline's value instead of the threshold."""
        if then is None:
            return self._unmeasured(now.gate, f"the baseline has no value of {now.gate}")
        if now.unit in _TIMES:
            reason = f"{now.gate} is a time, and those of two runs differ by themselves: not judged"
            return replace(now, outcome=Outcome.NOT_MEASURED, limits=(), reason=reason)
        share = self.policy.threshold(_BASELINE_WORSENING)
        room = abs(then) * share
        signs = {Direction.AT_LEAST: -1, Direction.AT_MOST: 1}
        limits = tuple(
            GateLimit(direction=side.direction, limit=then + signs[side.direction] * room)
            for side in now.limits
        )
        if now.value is None:
            # A value that is none, or a check that broke, stays red: only silence is not measured.
            reason = f"{now.gate} has no value, the baseline has {then:g}: {now.reason}"
            return replace(now, limits=limits, reason=reason)
        if now.outcome is not self.evaluate_gate(now.gate, now.value, now.unit).outcome:
            # Of its check, which ended worse than the value says: a good value excuses nothing.
            return replace(now, limits=limits, reason=f"{now.reason}; the baseline has {then:g}")
        missed = _missed(now.gate, now.value, now.unit, limits)
        reason = f"{missed}; the baseline has {then:g}" if missed else ""
        return GateResult(
            gate=now.gate,
            outcome=Outcome.FAIL if missed else Outcome.PASS,
            value=now.value,
            unit=now.unit,
            limits=limits,
            reason=reason,
        )


def _gate_and_side(threshold: str) -> tuple[str, Direction]:
    match threshold.split("."):
        case [_, gate, "at_least" | "at_most" as side]:
            return gate, Direction(side)
    raise ConfigError(
        f"Threshold {threshold!r} is no limit of a gate; expected {GATE_SUITE}.NAME.at_least or "
        f"{GATE_SUITE}.NAME.at_most.",
        key=threshold,
    )


def _stale(record: RunRecord) -> str:
    return f"the evidence was judged under another policy ({record.policy_digest[:19]}); run again"


def _by_gate(evidence: Sequence[EvidenceRecord]) -> dict[str, list[tuple[object, str]]]:
    rows: dict[str, list[tuple[object, str]]] = {}
    for record in evidence:
        rows.setdefault(record.name, []).append((record.value, record.unit))
    return rows


def _room(result: GateResult) -> float:
    """Returns how far a value is on the good side of its limits; negative past one of them."""
    if result.value is None:
        return -math.inf
    signs = {Direction.AT_LEAST: 1, Direction.AT_MOST: -1}
    return min(signs[side.direction] * (result.value - side.limit) for side in result.limits)


def _no_greener_than(check: CheckRecord, result: GateResult) -> GateResult:
    """Keeps a gate from passing whose check did not, and one that broke from being silent."""
    broke = check.outcome in (Outcome.FAIL, Outcome.ERROR)
    is_green = result.outcome is Outcome.PASS
    is_silent = result.outcome is Outcome.NOT_MEASURED
    if check.outcome in (Outcome.PASS, Outcome.WARN) or not (is_green or (is_silent and broke)):
        return result
    red = check.outcome not in (Outcome.NOT_MEASURED, Outcome.FLAKY)
    return GateResult(
        gate=result.gate,
        outcome=Outcome.FAIL if red else Outcome.NOT_MEASURED,
        value=result.value,
        unit=result.unit,
        limits=result.limits,
        reason=f"check {check.id} ended as {check.outcome}: {check.reason}",
    )


def _judge(
    name: str, value: object, unit: str, expected: str, limits: Sequence[GateLimit]
) -> tuple[Outcome, float | None, str]:
    if value is None:
        return Outcome.NOT_MEASURED, None, f"{name} has no value"
    if unit != expected:
        reason = f"{name} is in {unit!r}, its threshold in {expected!r}; convert the value"
        return Outcome.ERROR, None, reason
    try:
        scalar = plain(value, name)
    except TypeError as error:
        return Outcome.ERROR, None, str(error)
    if scalar in _NON_FINITE:
        return Outcome.FAIL, None, f"{name} is {scalar}; expected a finite number"
    if isinstance(scalar, bool | str):
        return Outcome.ERROR, None, f"{name} is {scalar!r}; expected a finite number"
    missed = _missed(name, scalar, expected, limits)
    return (Outcome.FAIL if missed else Outcome.PASS), float(scalar), missed or ""


def _missed(name: str, value: float, unit: str, limits: Sequence[GateLimit]) -> str | None:
    shown = "" if unit == "1" else f" {unit}"
    for side in limits:
        # Nine digits of a value just past its limit are those of the limit.
        digits = "" if f"{value:.9g}" == f"{side.limit:.9g}" else ".9g"
        found, limit = f"{value:{digits}}{shown}", f"{side.limit:{digits}}{shown}"
        if side.direction is Direction.AT_LEAST and not value >= side.limit:
            return f"{name} is {found}, under its limit of {limit}"
        if side.direction is Direction.AT_MOST and not value <= side.limit:
            return f"{name} is {found}, over its limit of {limit}"
    return None
