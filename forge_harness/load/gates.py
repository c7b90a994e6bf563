"""The limits a load run is held to."""

from __future__ import annotations

from collections.abc import Sequence

from .peak import Peak
from .percentiles import Percentile
from .plan import LoadPlan
from .recovery import Recovery
from .report import Gate, PhaseReport

OVERLOAD_ABOVE = 10.0
"""Multiples of the base rate above which the server may shed."""
GOODPUT_OF_PEAK = 0.8
SHED_P95_S = 0.1
RECOVERY_S = 2.0
MEMORY_RATIO = 1.05


def gates(
    plan: LoadPlan,
    phases: Sequence[PhaseReport],
    *,
    recovery: Recovery | None,
    memory: Sequence[tuple[float, float]],
    peak: Peak | None,
) -> tuple[Gate, ...]:
    """Returns every gate of a run, in the order of the phases."""
    found: list[Gate] = []
    for index, phase in enumerate(phases):
        name = f"{phase.name} (again)" if phase.name in {p.name for p in phases[:index]} else None
        found += _phase_gates(phase, name or phase.name, plan, peak, first=index == 0)
    if recovery is not None:
        found.append(_recovery_gate(recovery))
    before = [size for t, size in memory if phases and t < phases[0].seconds]
    if len(memory) > 1 and before and len(phases) > 1:
        found.append(
            Gate(
                name="memory after over before",
                value=memory[-1][1] / before[-1],
                limit=MEMORY_RATIO,
                direction="at_most",
                unit="",
                reason="a queue that is not given back grows with each overload",
            )
        )
    return tuple(found)


def _phase_gates(
    phase: PhaseReport, name: str, plan: LoadPlan, peak: Peak | None, *, first: bool
) -> list[Gate]:
    if phase.multiple > OVERLOAD_ABOVE:
        return _overload_gates(phase, name, plan, peak)
    found = [
        _count(f"{name} failed requests", phase.failed, "every accepted request is answered right")
    ]
    if first:
        found.append(
            _count(f"{name} shed requests", phase.counts["shed"], "base load is all served")
        )
        found.append(_percentile(f"{name} response p95", phase.response, 0.95, plan.slo_s))
    return found


def _overload_gates(phase: PhaseReport, name: str, plan: LoadPlan, peak: Peak | None) -> list[Gate]:
    found = [
        _count(f"{name} errors", phase.counts["error"], "overload is shed, not answered wrong"),
        _percentile(f"{name} response p99", phase.response, 0.99, plan.slo_s),
    ]
    if phase.counts["shed"]:
        found.append(_percentile(f"{name} refusal p95", phase.refusal, 0.95, SHED_P95_S))
    if peak is not None and peak.goodput > 0:
        found.append(
            Gate(
                name=f"{name} goodput over peak",
                value=phase.goodput / peak.goodput,
                limit=GOODPUT_OF_PEAK,
                direction="at_least",
                unit="",
                reason="overload must not cost the work that is accepted",
            )
        )
    return found


def _recovery_gate(found: Recovery) -> Gate:
    value = found.seconds
    if found.measured and value is None:
        value = float("inf")
    return Gate(
        name="recovery",
        value=value,
        limit=RECOVERY_S,
        direction="at_most",
        unit="s",
        reason=found.problem or "all windows after it are good",
    )


def _count(name: str, value: int, reason: str) -> Gate:
    return Gate(
        name=name, value=value, limit=0, direction="at_most", unit="requests", reason=reason
    )


def _percentile(name: str, found: Sequence[Percentile], share: float, limit: float) -> Gate:
    own = next(p for p in found if p.share == share)
    return Gate(
        name=name,
        value=own.value,
        limit=limit,
        direction="at_most",
        unit="s",
        reason=own.text if own.value is None else "the objective of the response time",
    )
