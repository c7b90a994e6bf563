"""Turns the files of a run into its report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forge_harness.canonical import read_canonical
from forge_harness.errors import LoadError, several

from .gates import gates, recovers
from .metrics import (
    Sample,
    answers_by_code,
    is_restarted,
    labels_of,
    parse,
    refusal,
    unexplained,
)
from .percentiles import encoded_histogram, summary
from .plan import PLAN, LoadPlan, read_plan
from .records import Account, Fate, Record, account, read_records
from .recovery import Recovery, recovery, windows, worst
from .report import LoadReport, PhaseReport, Reconciliation, peak_from_json
from .schedule import Phase, arrivals, choices, phase_starts
from .session import REFUSED
from .traffic import Request, requests_of, route_of
from .validity import Cpu, cpu_share, lateness_p99, phase_problems

PEAK = "peak.json"
CONTEXT = "context.json"
_DETAILS = 8
_Found = TypeVar("_Found")


def analyse(directory: Path) -> LoadReport:
    """Returns the report of the run whose files are in a directory.

    The schedule is made again from the plan, so that what the generator did not write down is
    found missing.

    Raises:
        LoadError: The directory holds no run, or a damaged one.
    """
    if not directory.is_dir():
        raise LoadError(
            f"{directory} is no directory; `forge-harness load run --out DIR` makes one."
        )
    plan = read_plan(directory / PLAN)
    requests = requests_of(plan, directory)
    due = arrivals(plan.phases, plan.seed)
    books = account(read_records(directory), due, choices(len(due), len(requests), plan.seed))
    workers = _workers(directory, plan)
    phases = _phases(plan, books.records, [worker.cpu for worker in workers], requests)
    recovered = _recovery(plan, books.records, phases)
    memory = _taken(directory, "memory.json", _pairs) or ()
    peak = _taken(directory, PEAK, peak_from_json)
    reconciliation = _reconcile(directory, plan, books, requests, workers)
    return LoadReport(
        plan=plan,
        context=_taken(directory, CONTEXT, _mapping) or {},
        phases=phases,
        windows=windows(books.records, 0.0, plan.seconds),
        recovery=recovered,
        reconciliation=reconciliation,
        memory=memory,
        peak=peak,
        gates=gates(
            plan,
            phases,
            recovery=recovered,
            memory=memory,
            peak=peak,
            counters_lost=reconciliation.counters_lost,
        ),
        checked=sum(bool(request.expect) for request in requests),
        kinds=len(requests),
    )


@dataclass(frozen=True, slots=True)
class _Worker:
    index: int
    of: int
    cpu: Cpu
    stopped_at: float | None
    """When it was stopped before it was done."""


def _workers(directory: Path, plan: LoadPlan) -> list[_Worker]:
    found = []
    for path in sorted(directory.glob("generator-*.json")):
        content = _json(directory, path.name)
        try:
            cpu = [(float(t), float(used)) for t, used in content["cpu"]]
            stopped = content.get("stopped_at")
            worker = _Worker(
                int(content["worker"]),
                int(content["of"]),
                cpu,
                None if stopped is None else float(stopped),
            )
            same = content["plan_digest"] == plan.digest
            if not all(math.isfinite(value) for sample in cpu for value in sample):
                raise ValueError("a time that is none")
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        if not same:
            raise LoadError(
                f"{path} tells of another plan than {directory / PLAN}; use a directory a run."
            )
        found.append(worker)
    return found


def _phases(
    plan: LoadPlan, records: Sequence[Record], cpus: Sequence[Cpu], requests: Sequence[Request]
) -> tuple[PhaseReport, ...]:
    starts = phase_starts(plan.phases)
    return tuple(
        _phase(
            phase,
            [r for r in records if starts[i] <= r.intended < starts[i + 1]],
            cpus,
            plan,
            requests,
            start=starts[i],
        )
        for i, phase in enumerate(plan.phases)
    )


def _phase(
    phase: Phase,
    records: Sequence[Record],
    cpus: Sequence[Cpu],
    plan: LoadPlan,
    requests: Sequence[Request],
    *,
    start: float,
) -> PhaseReport:
    accepted = [r for r in records if r.fate is not Fate.SHED]
    shed = [r for r in records if r.fate is Fate.SHED]
    end = start + phase.seconds
    shares = [(cpu_share(cpu, start, end) or 0.0, cpu) for cpu in cpus]
    busiest = max(shares, key=lambda pair: pair[0], default=(0.0, ()))[1]
    first = [
        r.first - r.intended
        for r in accepted
        if r.fate is Fate.OK and r.first is not None and requests[r.kind].streamed
    ]
    wrong = Counter(r.detail for r in records if r.detail and r.fate is not Fate.SHED)
    return PhaseReport(
        name=phase.name,
        multiple=phase.multiple,
        rate=phase.rate,
        start=start,
        seconds=phase.seconds,
        offered=len(records),
        counts=_by_fate(records),
        good=sum(r.fate is Fate.OK and r.response_s <= plan.slo_s for r in records),
        response=summary(r.response_s for r in accepted),
        service=summary(r.service_s for r in accepted),
        refusal=summary(r.response_s for r in shed),
        first_byte=summary(first) if first else (),
        histogram=encoded_histogram(r.response_s for r in accepted),
        lateness_p99_s=lateness_p99(records),
        cpu_share=cpu_share(busiest, start, end),
        details=tuple(wrong.most_common(_DETAILS)),
        problems=tuple(phase_problems(records, busiest, plan, start, end)),
    )


def _recovery(
    plan: LoadPlan, records: Sequence[Record], phases: Sequence[PhaseReport]
) -> Recovery | None:
    base = phases[0] if phases[0].multiple == 1 else None
    p95 = None if base is None else next(p.value for p in base.response if p.share == 0.95)
    return worst(
        recovery(
            records,
            drop=phase.start,
            end=phase.start + phase.seconds,
            rate=phase.rate,
            baseline_p95=p95,
            slo_s=plan.slo_s,
        )
        for index, phase in enumerate(phases)
        if recovers(phases, index)
    )


def _reconcile(
    directory: Path,
    plan: LoadPlan,
    books: Account,
    requests: Sequence[Request],
    workers: Sequence[_Worker],
) -> Reconciliation:
    ended = [r for r in books.records if r.fate not in (Fate.DROPPED, Fate.CENSORED)]
    failed = sum(r.fate in (Fate.ERROR, Fate.TIMEOUT) for r in ended)
    own = Counter(r.status for r in ended if r.status is not None)
    sent = sum(r.sent is not None for r in books.records)
    locust = _taken(directory, "locust.json", _counts)
    routes = frozenset(route_of(request.path) for request in requests)
    server, lost = _server_codes(directory, routes)
    unknown = None if server is None else unexplained(own, server, sent - own.total())
    return Reconciliation(
        scheduled=len(books.records),
        counts=_by_fate(books.records),
        missing=books.missing,
        duplicated=books.duplicated,
        foreign=books.foreign,
        ended=len(ended),
        failed=failed,
        locust=locust,
        own_codes=dict(own),
        server_codes=None if server is None else dict(server),
        unexplained=unknown,
        counters_lost=lost,
        problems=(
            *_stops(workers, plan),
            *_book_problems(books, workers, locust, (len(ended), failed), unknown),
        ),
    )


def _stops(workers: Sequence[_Worker], plan: LoadPlan) -> list[str]:
    stops = [worker.stopped_at for worker in workers if worker.stopped_at is not None]
    return [f"the run was stopped at {min(stops):.1f} s of {plan.seconds:g} s"] if stops else []


def _book_problems(
    books: Account,
    workers: Sequence[_Worker],
    locust: tuple[int, int] | None,
    own: tuple[int, int],
    unknown: int | None,
) -> list[str]:
    problems = []
    if not books.balanced:
        problems.append(
            f"the records do not cover the schedule: {books.missing} missing, "
            f"{books.duplicated} twice, {books.foreign} of no scheduled request"
        )
    if (
        not workers
        or sorted(w.index for w in workers) != [*range(len(workers))]
        or (len(workers) != workers[0].of)
    ):
        told = f"{len(workers)} of {workers[0].of}" if workers else "none"
        problems.append(f"generator processes that ended well: {told}")
    if locust is None:
        problems.append("Locust left no counts")
    elif locust != own:
        problems.append(
            f"Locust counted {several(locust[0], 'request')} and {several(locust[1], 'failure')}, "
            f"the records say {own[0]} and {own[1]}"
        )
    if unknown:
        problems.append(
            f"the server's counters and the records differ by {several(unknown, 'request')}; "
            "was somebody else using it?"
        )
    return problems


def _server_codes(directory: Path, routes: frozenset[str]) -> tuple[Counter[int] | None, str]:
    """What the server counted between the two scrapes, and why that is not known though it counts.

    "" when it is known, or the server offers no counters at all.
    """
    status = _taken(directory, REFUSED, lambda content: int(content["status"]))
    if status is not None:
        return None, refusal(status)
    earlier, later = (_scrape(directory / f"server-{when}.prom") for when in ("before", "after"))
    if earlier is None:
        return None, ""
    if later is not None and is_restarted(earlier, later):
        return None, (
            "the server's counters are of another process than before the load: it was started "
            "again under it, or has several"
        )
    # The second scrape names every route that was asked for; the first need not.
    labels = labels_of(later or (), routes)
    before = answers_by_code(earlier, labels)
    found = None if later is None else answers_by_code(later, labels)
    if found is None:
        # Before the first request a counter may have no sample; it does not lose one later.
        is_lost = later is None or before is not None
        return None, "the server's counters could not be read at the end" if is_lost else ""
    found.subtract(before or Counter())
    return Counter({code: count for code, count in found.items() if count}), ""


def _scrape(path: Path) -> tuple[Sample, ...] | None:
    try:
        return parse(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _by_fate(records: Sequence[Record]) -> dict[str, int]:
    counted = Counter(record.fate for record in records)
    return {fate.value: counted[fate] for fate in Fate}


def _json(directory: Path, name: str) -> Any:  # noqa: ANN401 - any JSON value
    path = directory / name
    if not path.exists():
        return None
    try:
        return read_canonical(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _taken(directory: Path, name: str, take: Callable[[Any], _Found]) -> _Found | None:
    """Returns what a file of the run holds, None without the file; JSON of another form is damage.

    Raises:
        LoadError: It does not hold what it should.
    """
    content = _json(directory, name)
    try:
        return None if content is None else take(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(directory / name, error) from error


def _pairs(content: Any) -> tuple[tuple[float, float], ...]:  # noqa: ANN401 - any JSON value
    pairs = tuple((float(time), float(size)) for time, size in content)
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        raise ValueError("a size that is none")
    return pairs


def _counts(content: Any) -> tuple[int, int]:  # noqa: ANN401 - any JSON value
    return int(content["requests"]), int(content["failures"])


def _mapping(content: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} in place of an object")
    return content


def _damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(f"{path} is damaged ({error!r}); run the load again.")
