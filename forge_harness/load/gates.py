"""The limits a load run is held to."""

from __future__ import annotations

from collections.abc import Sequence

from .peak import GOODPUT_SHARE, Peak
from .percentiles import Percentile
from .plan import LoadPlan
from .recovery import Recovery
from .report import Gate, PhaseReport

OVERLOAD_ABOVE = 10.0
"""Multiples of the base rate above which the server may shed. At it the server does all it can, and
is held to what it was found to do: the share of a probe that is served."""
GOODPUT_OF_PEAK = 0.8
SHED_P95_S = 0.1
RECOVERY_S = 2.0
MEMORY_RATIO = 1.05
_RIGHT = "every accepted request is answered right"
_NOTHING_DUE = "no request was due in it"


def gates(
    plan: LoadPlan,
    phases: Sequence[PhaseReport],
    *,
    recovery: Recovery | None,
    memory: Sequence[tuple[float, float]],
    peak: Peak | None,
    counters_lost: str = "",
) -> tuple[Gate, ...]:
    """Returns every gate of a run, in the order of the phases."""
    found: list[Gate] = []
    for index, phase in enumerate(phases):
        name = phase.name + _again(sum(p.name == phase.name for p in phases[:index]))
        if phase.multiple > OVERLOAD_ABOVE:
            found += _overload_gates(phase, name, plan, peak)
            continue
        found.append(_count(f"{name} failed requests", phase, phase.failed, _RIGHT))
        if not recovers(phases, index):
            found += _service_gates(phase, name, plan)
    if recovery is not None:
        found.append(_recovery_gate(recovery))
    before = [size for t, size in memory if phases and t < phases[0].seconds and size > 0]
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
    if counters_lost:
        found.append(
            Gate(
                name="unexplained requests",
                value=None,
                limit=0,
                direction="at_most",
                unit="requests",
                reason=counters_lost,
            )
        )
    return tuple(found)


def _again(before: int) -> str:
    """Returns what sets a phase apart from as many of its name before it."""
    return "" if not before else " (again)" if before == 1 else f" (again, {before})"


def recovers(phases: Sequence[PhaseReport], index: int) -> bool:
    """Returns whether a phase is the lower load after an overload.

    What the server sheds in it and how long it takes is held to the time of the recovery.
    """
    after = index > 0 and phases[index - 1].multiple > OVERLOAD_ABOVE
    return after and phases[index].multiple < OVERLOAD_ABOVE


def _service_gates(phase: PhaseReport, name: str, plan: LoadPlan) -> list[Gate]:
    shed = phase.counts["shed"]
    if phase.multiple < OVERLOAD_ABOVE:
        served = _count(f"{name} shed requests", phase, shed, "only overload may be shed")
    else:
        served = Gate(
            name=f"{name} accepted share",
            value=1 - shed / phase.offered if phase.offered else None,
            limit=GOODPUT_SHARE,
            direction="at_least",
            unit="",
            reason="as of a rate that is served" if phase.offered else _NOTHING_DUE,
        )
    return [served, _percentile(f"{name} response p95", phase.response, 0.95, plan.slo_s)]


def _overload_gates(phase: PhaseReport, name: str, plan: LoadPlan, peak: Peak | None) -> list[Gate]:
    errors = phase.counts["error"]
    found = [
        _count(f"{name} errors", phase, errors, "overload is shed, not answered wrong"),
        _percentile(f"{name} response p99", phase.response, 0.99, plan.slo_s),
    ]
    if phase.counts["shed"]:
        found.append(_percentile(f"{name} refusal p95", phase.refusal, 0.95, SHED_P95_S))
    capacity = peak.goodput if peak is not None else plan.capacity or 0.0
    if capacity > 0:
        # Phases of a small share of the capacity are below it, whatever their multiple.
        most = min(capacity, phase.offered / phase.seconds)
        found.append(
            Gate(
                name=f"{name} goodput over peak",
                value=phase.goodput / most if phase.offered else None,
                limit=GOODPUT_OF_PEAK,
                direction="at_least",
                unit="",
                reason="overload must not cost the work that is accepted"
                if phase.offered
                else _NOTHING_DUE,
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


def _count(name: str, phase: PhaseReport, value: int, reason: str) -> Gate:
    return Gate(
        name=name,
        value=value if phase.offered else None,
        limit=0,
        direction="at_most",
        unit="requests",
        reason=reason if phase.offered else _NOTHING_DUE,
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
