"""A load run from beginning to end: find the capacity, run the phases, report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge_harness.durable import write_durably
from forge_harness.errors import ExitCode, LoadError

from .analysis import CONTEXT, PEAK, analyse
from .metrics import UnreachableError
from .peak import Peak, Probe, search
from .percentiles import nearest_rank
from .plan import PLAN, SHAPES, LoadPlan, Shape, check_plan, phases_at, read_plan
from .records import Fate, account, read_records
from .report import REPORT, LoadReport, peak_json
from .schedule import Phase, arrivals, choices
from .session import Generator, OnStep, server_of
from .traffic import requests_of
from .validity import generator_problems

BASE_SHARE = 0.1
"""Base rate as a share of the capacity: 10x is then the most the server can do."""
GENERATOR_LOG = "locust.log"
_DRAIN_S = 3.0
"""A probe of a server that does not keep up takes longer than its phase by about this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """How long a search for the peak may take, and how long a probe is."""

    cap_s: float
    probe_s: float
    start: float = 20.0
    highest: float = 100_000.0


LIMITS = {
    "quick": SearchLimits(cap_s=40, probe_s=2),
    "full": SearchLimits(cap_s=90, probe_s=4),
    "nightly": SearchLimits(cap_s=240, probe_s=10),
}
"""Profile -> limits of the search."""

OnProbe = Callable[[Probe], None]


class ServerLostError(LoadError):
    """The server answered before the search for its capacity and did not outlive it.

    That is no wrong address: it is what the server does under load, and a failure of it.
    """

    exit_code = ExitCode.GATE_FAILED


def find_peak(
    generator: Generator,
    template: LoadPlan,
    directory: Path,
    limits: SearchLimits,
    *,
    on_step: OnStep | None = None,
    on_probe: OnProbe | None = None,
) -> Peak:
    """Returns the highest rate a server serves within the objective, and writes peak.json.

    Args:
        generator: Runs the probes.
        template: Address, requests, objective and timeout; its phases are not used.
        directory: Where peak.json and the probes' files go.
        limits: Of the search.
        on_step: Told how far a probe is.
        on_probe: Told of each probe that ended.

    Raises:
        UnreachableError: Nothing answers at the address.
        ServerLostError: Nothing does any more after a probe.
        GeneratorError: The generator ended.
    """
    count = 0
    last = ""

    def probe(rate: float) -> Probe:
        nonlocal count, last
        phase = Phase(name=f"{rate:.0f}/s", multiple=1, rate=rate, seconds=limits.probe_s)
        plan = replace(template, phases=(phase,), seed=template.seed + count)
        own = directory / "probes" / f"{count:02d}"
        count += 1
        with _after_probe(last):
            generator.run(check_plan(plan), own, on_step)
        last = phase.name
        found = read_probe(own)
        if on_probe is not None:
            on_probe(found)
        return found

    peak = search(
        probe,
        start=limits.start,
        slo_s=template.slo_s,
        cap_s=limits.cap_s,
        probe_s=limits.probe_s + _DRAIN_S,
        clock=time.monotonic,
        highest=limits.highest,
    )
    write_durably(directory / PEAK, json.dumps(peak_json(peak), indent=1).encode() + b"\n")
    return peak


@contextlib.contextmanager
def _after_probe(name: str) -> Iterator[None]:
    """Says of a server that does not answer any more that it did before a probe, if there was."""
    try:
        yield
    except UnreachableError as error:
        if not name:
            raise
        raise ServerLostError(
            f"The server answered, and after the probe of {name} it does not any more "
            f"({error.reason}): it ended under the load, or has not caught up with it; look at its "
            "log, or give a --rate that it can serve."
        ) from error


def read_probe(directory: Path) -> Probe:
    """Returns what a run of one phase says about its rate."""
    plan = read_plan(directory / PLAN)
    due = arrivals(plan.phases, plan.seed)
    kinds = choices(len(due), len(requests_of(plan, directory)), plan.seed)
    books = account(read_records(directory), due, kinds)
    told = json.loads((directory / "generator-0.json").read_bytes())
    good = sum(r.fate is Fate.OK and r.response_s <= plan.slo_s for r in books.records)
    accepted = sorted(r.response_s for r in books.records if r.fate is not Fate.SHED)
    return Probe(
        rate=plan.phases[0].rate,
        offered=len(due),
        good=good,
        goodput=good / plan.seconds,
        p95_s=accepted[nearest_rank(len(accepted), 0.95) - 1] if accepted else None,
        valid=books.balanced and not generator_problems(books.records, told["cpu"], plan),
    )


def run_load(
    generator: Generator, plan: LoadPlan, directory: Path, *, on_step: OnStep | None = None
) -> LoadReport:
    """Runs a plan, and writes and returns its report.

    Raises:
        LoadError: Nothing answers at the plan's address.
        GeneratorError: The generator ended.
    """
    context = _context()
    generator.run(check_plan(plan), directory, on_step)
    context["finished_at"] = _now()
    context["load_average_after"] = list(os.getloadavg())
    write_durably(directory / CONTEXT, json.dumps(context, indent=1).encode() + b"\n")
    return write_report(directory)


def write_report(directory: Path) -> LoadReport:
    """Makes the report of a directory again, from the files of the run, and writes report.json.

    Raises:
        LoadError: The directory holds no run, or a damaged one.
    """
    report = analyse(directory)
    write_durably(directory / REPORT, report.to_json())
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Where the base rate of a run comes from: given, or a share of the capacity.

    Attributes:
        rate: Requests a second; None for a share of the capacity.
        capacity: Requests a second; None to search for it.
        share: Of the capacity. 10x is all the server can do when it is a tenth.
    """

    rate: float | None = None
    capacity: float | None = None
    share: float = BASE_SHARE


def measure(
    template: LoadPlan,
    directory: Path,
    *,
    profile: str,
    shape: Shape | None = None,
    base: Base | None = None,
    on_step: OnStep | None = None,
    on_probe: OnProbe | None = None,
) -> LoadReport:
    """Finds the capacity where no rate is given, runs the phases, and returns the report.

    Args:
        template: Address, requests, objective and timeout; its phases are not used.
        directory: New or empty; every file of the run goes there.
        profile: Decides how long the search takes and, without a shape, the phases.
        shape: (multiple of the base rate, seconds) of each phase.
        base: Where the base rate comes from; a tenth of the capacity that is found when None.
        on_step: Told how far the run is.
        on_probe: Told of each probe of the search that ended.

    Raises:
        LoadError: Nothing answers at the address, or nothing is served; the directory is not empty.
        ServerLostError: Nothing answers any more after the search for the capacity.
        GeneratorError: The generator ended.
        KeyboardInterrupt: As it came; the report of what was sent until then is written.
    """
    base = base or Base()
    # Before anything is written: a second try must find its directory as the first did.
    server_of(template).check()
    fresh_directory(directory)
    try:
        with Generator(directory / GENERATOR_LOG) as generator:
            rate, capacity, last = base.rate, base.capacity, ""
            if rate is None and capacity is None:
                limits = LIMITS[profile]
                peak = find_peak(
                    generator, template, directory, limits, on_step=on_step, on_probe=on_probe
                )
                capacity = _capacity(peak)
                last = f"{peak.probes[-1].rate:.0f}/s"
            if rate is None:
                rate = base.share * (capacity or 0.0)
            plan = shaped(replace(template, capacity=capacity), rate, shape, profile)
            with _after_probe(last):
                return run_load(generator, plan, directory, on_step=on_step)
    except KeyboardInterrupt:
        # The generator has ended by now and left its records. Without a plan, the search was on.
        with contextlib.suppress(LoadError):
            write_report(directory)
        raise


def _capacity(peak: Peak) -> float:
    if peak.bound == "nothing":
        raise LoadError(
            "The server did not serve even 1 request/s within the objective, so there is no "
            "capacity to take a share of; look at its answers (`load peak`), or give --rate."
        )
    if peak.rate <= 0:
        why = "the generator could not keep its schedule"
        if peak.bound == "time":
            why = f"its time was over before less than {peak.above or 0:.3g}/s was tried"
        raise LoadError(
            f"The search found no rate that is served: {why}. Give --rate, a lower --timeout, or a "
            "--profile whose search is longer."
        )
    return peak.rate


def shaped(template: LoadPlan, rate: float, shape: Shape | None, profile: str) -> LoadPlan:
    """Returns a plan with the phases of a shape, or of a profile, at a base rate.

    Raises:
        LoadError: The plan cannot be run.
    """
    return check_plan(replace(template, phases=phases_at(rate, shape or SHAPES[profile])))


def fresh_directory(directory: Path) -> None:
    """Refuses a directory that holds another run's files.

    Raises:
        LoadError: It is not empty, or a file.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise LoadError(f"--out {directory} exists and is not an empty directory; name a new one.")
    directory.mkdir(parents=True, exist_ok=True)


def _context() -> dict[str, Any]:
    return {
        "started_at": _now(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "locust": version("locust"),
        "load_average_before": list(os.getloadavg()),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
