"""The generator's own limits are found, and said, before the server is blamed."""

from dataclasses import replace

import pytest

from forge_harness.load.records import Fate
from forge_harness.load.validity import (
    cpu_share,
    generator_problems,
    lateness_limit,
    lateness_p99,
    phase_problems,
)

from . import support

PLAN = support.plan_of(shape=((1, 5), (1, 5)))
IDLE = [(t / 2, 0.1 * t / 2) for t in range(21)]


def problems(change, *, share=1.0, cpu=IDLE):
    """Problems when the first `share` of a good run's records are changed."""
    records = support.served(PLAN)
    count = round(share * len(records))
    return generator_problems([*map(change, records[:count]), *records[count:]], cpu, PLAN)


def test_a_schedule_that_was_kept_is_valid():
    assert problems(lambda r: r) == []


def test_one_dropped_request_is_enough():
    found = problems(lambda r: replace(r, fate=Fate.DROPPED, sent=None), share=0.003)
    assert len(found) == 1
    assert "1 request not sent: 1024 were in flight" in found[0]


def test_lateness_is_judged_by_its_p99():
    late = lambda r: replace(r, sent=r.intended + 0.06)  # noqa: E731
    assert problems(late, share=0.002) == []
    (found,) = problems(late, share=0.05)
    assert found.startswith("1x: requests were sent up to 60 ms late (p99); at most 50 ms")


def test_a_phase_that_was_not_sent_is_found_even_when_the_others_were():
    found = problems(lambda r: replace(r, sent=None, fate=Fate.CENSORED), share=0.5)
    assert any("sent 0 of" in problem for problem in found)
    assert any("is not known" in problem for problem in found)


def test_a_busy_generator_is_found():
    (first, second) = problems(lambda r: r, cpu=[(t, 0.95 * t) for t, _ in IDLE])
    assert first == "1x: the generator used 95 % of a core"
    assert second == first
    only_later = [(t, 0.1 * t if t <= 5 else 0.5 + (t - 5)) for t, _ in IDLE]
    assert len(problems(lambda r: r, cpu=only_later)) == 1


def test_processor_time_is_taken_between_the_bounds():
    cpu = [(0.0, 1.0), (2.0, 2.0), (4.0, 2.0)]
    assert cpu_share(cpu, 0, 2) == 0.5
    assert cpu_share(cpu, 2, 4) == 0
    assert cpu_share(cpu, 1, 3) == 0.25
    assert cpu_share(cpu, 0, 100) == 0.25
    assert cpu_share(cpu, 3.8, 100) is None
    assert cpu_share(cpu[:1], 0, 2) is None


@pytest.mark.parametrize(("slo", "limit"), [(0.02, 0.01), (0.1, 0.01), (0.5, 0.05), (2.0, 0.2)])
def test_a_tight_objective_still_allows_ten_milliseconds(slo, limit):
    assert lateness_limit(replace(PLAN, slo_s=slo)) == pytest.approx(limit)


def test_nothing_sent_has_no_lateness():
    assert lateness_p99([]) is None
    assert phase_problems([], IDLE, PLAN, 0, 5) == []
