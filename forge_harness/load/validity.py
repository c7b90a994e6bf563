"""Whether a run measured the server, or the limits of the generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from forge_harness.errors import several

from .plan import LoadPlan
from .records import LACKING, Fate, Record
from .schedule import phase_starts

LATENESS_S = 0.010
"""p99 of how late requests were sent; or a tenth of the objective, when that is more."""
SENT_SHARE = 0.98
CPU_SHARE = 0.90
"""Of one core: the generator is one thread."""

Cpu = Sequence[tuple[float, float]]
"""(time from the start, processor seconds so far), ascending."""


def generator_problems(records: Sequence[Record], cpu: Cpu, plan: LoadPlan) -> list[str]:
    """Returns why some phase was not the load it was meant to be; empty when every phase was.

    Args:
        records: Of one generator process, or of all with `cpu` of the busiest.
        cpu: Processor time the process used.
        plan: What it should have done.
    """
    starts = phase_starts(plan.phases)
    problems = []
    for index, phase in enumerate(plan.phases):
        low, high = starts[index], starts[index + 1]
        own = [r for r in records if low <= r.intended < high]
        problems += [f"{phase.name}: {p}" for p in phase_problems(own, cpu, plan, low, high)]
    return problems


def phase_problems(
    records: Sequence[Record], cpu: Cpu, plan: LoadPlan, low: float, high: float
) -> list[str]:
    """Returns what the generator did not manage between two times, each in a clause."""
    problems = []
    dropped = [record.detail for record in records if record.fate is Fate.DROPPED]
    lacking = [detail for detail in dropped if detail.startswith(LACKING)]
    if lacking:
        count = several(len(lacking), "request")
        problems.append(f"{count} not sent: {lacking[0]}; raise `ulimit -n` of the generator")
    if len(dropped) > len(lacking):
        count = several(len(dropped) - len(lacking), "request")
        problems.append(f"{count} not sent: {plan.concurrency} were in flight")
    sent = sum(record.sent is not None for record in records)
    if records and sent / len(records) < SENT_SHARE:
        problems.append(f"sent {sent} of {several(len(records), 'scheduled request')}")
    censored = sum(record.fate is Fate.CENSORED for record in records)
    if censored:
        problems.append(f"the end of {several(censored, 'request')} is not known")
    late = lateness_p99(records)
    limit = lateness_limit(plan)
    if late is not None and late > limit:
        problems.append(
            f"requests were sent up to {1000 * late:.0f} ms late (p99); "
            f"at most {1000 * limit:.0f} ms leaves the latencies as they are"
        )
    busy = cpu_share(cpu, low, high)
    if busy is not None and busy > CPU_SHARE:
        problems.append(f"the generator used {100 * busy:.0f} % of a core")
    return problems


def lateness_limit(plan: LoadPlan) -> float:
    """Returns how late the p99 request may be sent, in seconds."""
    return max(LATENESS_S, plan.slo_s / 10)


def lateness_p99(records: Sequence[Record]) -> float | None:
    """Returns the nearest-rank p99 of how late requests were sent; None when none was."""
    late = sorted(r.sent - r.intended for r in records if r.sent is not None)
    return late[math.ceil(0.99 * len(late)) - 1] if late else None


def cpu_share(cpu: Cpu, low: float, high: float) -> float | None:
    """Returns processor seconds a second between two times; None when they were not sampled."""
    if len(cpu) < 2 or high <= low:
        return None
    low, high = max(low, cpu[0][0]), min(high, cpu[-1][0])
    if high - low < 0.5:
        # One sample covers a good part of a short stretch; it says little about it.
        return None
    return (_at(cpu, high) - _at(cpu, low)) / (high - low)


def _at(cpu: Cpu, t: float) -> float:
    for (t0, used0), (t1, used1) in pairwise(cpu):
        if t0 <= t <= t1:
            return used0 + (used1 - used0) * (t - t0) / (t1 - t0) if t1 > t0 else used1
    return cpu[-1][1] if t > cpu[-1][0] else cpu[0][1]
