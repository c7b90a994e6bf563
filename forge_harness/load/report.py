"""What a load run found, as data, JSON and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from forge_harness.errors import ExitCode, several

from .peak import Bound, Peak, Probe
from .percentiles import Percentile, milliseconds
from .plan import LoadPlan
from .recovery import Recovery, Window

SCHEMA = "forge-load/1"
REPORT = "report.json"

LoadVerdict = Literal["PASS", "FAIL", "INCOMPLETE", "INVALID"]
EXIT_CODES: dict[LoadVerdict, ExitCode] = {
    "PASS": ExitCode.PASS,
    "FAIL": ExitCode.GATE_FAILED,
    "INCOMPLETE": ExitCode.INCOMPLETE,
    # The load was not what was asked for: nothing was measured.
    "INVALID": ExitCode.INCOMPLETE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """One phase: what was offered and what became of it."""

    name: str
    multiple: float
    rate: float
    """Asked for, requests a second."""
    start: float
    seconds: float
    offered: int
    counts: dict[str, int]
    """Class -> requests, every class named."""
    good: int
    """Answered correctly within the objective, from when they were due."""
    response: tuple[Percentile, ...]
    """Accepted requests, from when they were due; infinite without an answer."""
    service: tuple[Percentile, ...]
    """Accepted requests, from when they were sent."""
    refusal: tuple[Percentile, ...]
    """Shed requests, from when they were due."""
    first_byte: tuple[Percentile, ...]
    """Streamed requests that were answered: from when they were due to the first byte."""
    histogram: str
    """Response times that are finite, HdrHistogram V2."""
    lateness_p99_s: float | None
    cpu_share: float | None
    """Of one core, of the busiest generator process."""
    details: tuple[tuple[str, int], ...]
    """What was wrong, and how often; the most frequent first."""
    problems: tuple[str, ...]
    """Why this phase was not the load it was meant to be."""

    @property
    def goodput(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds

    @property
    def failed(self) -> int:
        """Errors and timeouts."""
        return self.counts["error"] + self.counts["timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """The same requests as the schedule, the records, Locust and the server count them."""

    scheduled: int
    counts: dict[str, int]
    missing: int
    duplicated: int
    foreign: int
    ended: int
    """Sent, and known how they ended."""
    failed: int
    locust: tuple[int, int] | None
    """Requests and failures as Locust counted them."""
    own_codes: dict[int, int]
    server_codes: dict[int, int] | None
    """None when the server offers no counters."""
    unexplained: int | None
    """Requests that our count and the server's cannot both be right about."""
    counters_lost: str
    """Why the counters that the server has were not read, in a clause; "" otherwise."""
    problems: tuple[str, ...]

    @property
    def server_text(self) -> str:
        """How the server's counters compare, in a clause."""
        if self.counters_lost:
            return f"not compared: {self.counters_lost}"
        if self.server_codes is None:
            return "not compared with the server: it offers no forge_requests_total"
        return f"the server's counters leave {self.unexplained} unexplained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A value that must be on one side of its limit."""

    name: str
    value: float | None
    limit: float
    direction: Literal["at_most", "at_least"]
    unit: str
    reason: str
    """Of the limit; or why there is no value."""

    @property
    def state(self) -> Literal["pass", "fail", "not_measured"]:
        """How it stands."""
        if self.value is None:
            return "not_measured"
        kept = self.value <= self.limit if self.direction == "at_most" else self.value >= self.limit
        return "pass" if kept else "fail"

    @property
    def text(self) -> str:
        """For example "1x failed requests: 0 requests, at most 0"."""
        if self.value is None:
            return f"{self.name}: not measured, {self.reason}"
        value = "no answer" if math.isinf(self.value) else f"{self.value:.4g} {self.unit}".strip()
        return f"{self.name}: {value}, {self.direction.replace('_', ' ')} {self.limit:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Everything a run found. Made from the files of its directory alone."""

    plan: LoadPlan
    context: dict[str, Any]
    """When and on what machine."""
    phases: tuple[PhaseReport, ...]
    windows: tuple[Window, ...]
    recovery: Recovery | None
    """The worst of the plan's overloads; None when no lower load follows one."""
    reconciliation: Reconciliation
    memory: tuple[tuple[float, float], ...]
    """(time, resident bytes of the server) during the run and at its end."""
    peak: Peak | None
    gates: tuple[Gate, ...]
    checked: int
    """Requests of the file whose answers are compared with an expected one."""
    kinds: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the run is invalid; empty when it is not."""
        found = [f"{phase.name}: {p}" for phase in self.phases for p in phase.problems]
        return (*found, *self.reconciliation.problems)

    @property
    def verdict(self) -> LoadVerdict:
        """PASS, FAIL, INCOMPLETE (a gate was not measured) or INVALID (the load was not kept)."""
        if self.problems:
            return "INVALID"
        states = {gate.state for gate in self.gates}
        if "fail" in states:
            return "FAIL"
        return "INCOMPLETE" if "not_measured" in states else "PASS"

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of the verdict."""
        return EXIT_CODES[self.verdict]

    def document(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "problems": list(self.problems),
            "plan": self.plan.document(),
            "plan_digest": self.plan.digest,
            "context": self.context,
            "requests": {"kinds": self.kinds, "with_expected_answer": self.checked},
            "gates": [_gate_json(gate) for gate in self.gates],
            "phases": [_phase_json(phase) for phase in self.phases],
            "recovery": None if self.recovery is None else _recovery_json(self.recovery),
            "reconciliation": _reconciliation_json(self.reconciliation),
            "memory": [list(pair) for pair in self.memory],
            "peak": None if self.peak is None else peak_json(self.peak),
            "windows": [_window_json(window) for window in self.windows],
        }

    def to_json(self) -> bytes:
        """Returns the report as indented JSON; the same directory gives the same bytes."""
        return json.dumps(self.document(), indent=1, allow_nan=False).encode() + b"\n"


def table(report: LoadReport) -> str:
    """Returns the report for a terminal."""
    lines = [[*_HEAD]]
    lines += [_row(phase) for phase in report.phases]
    books = report.reconciliation
    ends = " + ".join(f"{count} {name}" for name, count in books.counts.items())
    said = [
        _aligned(lines),
        f"offered {books.scheduled} = {ends}; {books.server_text}.",
    ]
    if report.checked < report.kinds:
        unchecked = report.kinds - report.checked
        said.append(
            f"{unchecked} of {several(report.kinds, 'request')} without an expected answer: only "
            "the form of theirs was checked."
        )
    if report.recovery is not None:
        said.append(f"recovery: {recovery_text(report.recovery)}")
    if report.peak is not None:
        said.append(f"capacity: {peak_text(report.peak)}")
    # Of an invalid run nothing was measured: no gate of it may read as a pass.
    words = ["void" if report.problems else gate.state.replace("_", " ") for gate in report.gates]
    said += [f"  {word:<12}  {gate.text}" for word, gate in zip(words, report.gates, strict=True)]
    said += [f"  invalid       {problem}" for problem in report.problems]
    said.append(f"{report.verdict}")
    return "\n".join(said)


_HEAD = ("phase", "offered/s", "good/s", "ok", "shed", "error", "timeout", "p50", "p95", "p99")


def _row(phase: PhaseReport) -> list[str]:
    by_share = {p.share: p for p in phase.response}
    return [
        phase.name,
        f"{phase.offered / phase.seconds:.1f}",
        f"{phase.goodput:.1f}",
        *(str(phase.counts[name]) for name in ("ok", "shed", "error", "timeout")),
        *(short(by_share[share]) for share in (0.5, 0.95, 0.99)),
    ]


def short(found: Percentile) -> str:
    """Returns a percentile's value, or how many samples it has of how many it needs."""
    if found.value is None:
        return f"n={found.count}<{found.needed}"
    return milliseconds(found.value)


def recovery_text(found: Recovery) -> str:
    """Returns the recovery time in words."""
    if not found.measured:
        return f"not measured, {found.problem}"
    if found.seconds is None:
        return f"none within {found.watched_s:g} s"
    return f"{found.seconds:g} s (windows of 0.5 s, p95 at most {milliseconds(found.limit_s)})"


def peak_text(found: Peak) -> str:
    """Returns the peak in words."""
    if found.bound == "nothing":
        return "not even 1 request/s was served within the objective"
    least = "at least " if found.is_lower_bound else ""
    why = {
        "server": f"{found.above or 0:.0f}/s was not served",
        "generator": "the generator could not send more",
        "time": "the time for the search was over",
        "limit": "the highest rate allowed was served",
    }[found.bound]
    return f"{least}{found.rate:.1f} requests/s ({why}; {several(len(found.probes), 'probe')})"


def peak_table(found: Peak) -> str:
    """Returns the probes of a search for a terminal."""
    lines = [["asked/s", "offered", "good", "good/s", "p95", "generator"]]
    lines += [
        [
            f"{p.rate:.1f}",
            str(p.offered),
            str(p.good),
            f"{p.goodput:.1f}",
            milliseconds(p.p95_s),
            "kept up" if p.valid else "too slow",
        ]
        for p in found.probes
    ]
    return _aligned(lines)


def peak_json(found: Peak) -> dict[str, Any]:
    """Returns a peak as JSON values."""
    return {
        "rate": found.rate,
        "above": found.above,
        "goodput": found.goodput,
        "bound": found.bound,
        "probes": [
            {
                "rate": p.rate,
                "offered": p.offered,
                "good": p.good,
                "goodput": p.goodput,
                "p95_s": finite(p.p95_s),
                "valid": p.valid,
            }
            for p in found.probes
        ],
    }


def peak_from_json(content: dict[str, Any]) -> Peak:
    """Returns the peak that `peak_json` wrote.

    Raises:
        KeyError: It wrote none of that form; also TypeError.
    """
    probes = tuple(
        Probe(**{**p, "p95_s": math.inf if p["p95_s"] is None else p["p95_s"]})
        for p in content["probes"]
    )
    peak = Peak(**{**content, "probes": probes})
    numbers: list[object] = [peak.rate, peak.goodput]
    numbers += [] if peak.above is None else [peak.above]
    numbers += [n for p in probes for n in (p.rate, p.offered, p.good, p.goodput, p.p95_s)]
    wrong = [each for each in numbers if type(each) not in (int, float)]
    if wrong or peak.bound not in get_args(Bound):
        raise TypeError(f"{wrong[0]!r} in place of a number" if wrong else f"{peak.bound!r}")
    return peak


def finite(value: float | None) -> float | None:
    """Returns a number that JSON knows: None for an answer that never came."""
    return value if value is not None and math.isfinite(value) else None


def _percentile_json(found: Percentile) -> dict[str, Any]:
    state = "too_few" if found.value is None else "measured"
    if found.value is not None and math.isinf(found.value):
        state = "no_answer"
    return {
        "name": found.name,
        "state": state,
        "value_s": finite(found.value),
        "low_s": finite(found.low),
        "high_s": finite(found.high),
        "count": found.count,
        "needed": found.needed,
    }


def _phase_json(phase: PhaseReport) -> dict[str, Any]:
    return {
        "name": phase.name,
        "multiple": phase.multiple,
        "rate": phase.rate,
        "start": phase.start,
        "seconds": phase.seconds,
        "offered": phase.offered,
        "counts": phase.counts,
        "good": phase.good,
        "goodput": phase.goodput,
        "response": [_percentile_json(p) for p in phase.response],
        "service": [_percentile_json(p) for p in phase.service],
        "refusal": [_percentile_json(p) for p in phase.refusal],
        "first_byte": [_percentile_json(p) for p in phase.first_byte],
        "hdr_histogram_us": phase.histogram,
        "lateness_p99_s": phase.lateness_p99_s,
        "generator_cpu_share": phase.cpu_share,
        "details": dict(phase.details),
        "problems": list(phase.problems),
    }


def _gate_json(gate: Gate) -> dict[str, Any]:
    return {
        "name": gate.name,
        "state": gate.state,
        "value": finite(gate.value),
        "limit": gate.limit,
        "direction": gate.direction,
        "unit": gate.unit,
        "reason": gate.reason,
    }


def _recovery_json(found: Recovery) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "measured": found.measured,
        "watched_s": found.watched_s,
        "limit_s": found.limit_s,
        "problem": found.problem,
    }


def _reconciliation_json(found: Reconciliation) -> dict[str, Any]:
    server = found.server_codes
    return {
        "scheduled": found.scheduled,
        "counts": found.counts,
        "missing": found.missing,
        "duplicated": found.duplicated,
        "foreign": found.foreign,
        "ended": found.ended,
        "failed": found.failed,
        "locust": None if found.locust is None else list(found.locust),
        "own_codes": {str(k): v for k, v in sorted(found.own_codes.items())},
        "server_codes": None if server is None else {str(k): v for k, v in sorted(server.items())},
        "unexplained": found.unexplained,
        "problems": list(found.problems),
    }


def _window_json(window: Window) -> dict[str, Any]:
    return {
        "start": window.start,
        "offered": window.offered,
        "ok": window.ok,
        "shed": window.shed,
        "failed": window.failed,
        "p50_s": finite(window.p50_s),
        "p95_s": finite(window.p95_s),
    }


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
