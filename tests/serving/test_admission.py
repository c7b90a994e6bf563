import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.serving.admission import Admission, Quota
from forge_harness.serving.health import Health, State
from forge_harness.serving.metrics import Metrics
from forge_harness.serving.problems import NOT_READY, OVERLOADED, QUOTA, Problem
from forge_harness.serving.settings import Settings

from .support import FAULTY, running, wait_for


def entered(quota, client, now):
    try:
        quota.enter(client, now)
    except Problem as problem:
        return not (problem.kind is QUOTA and problem.retry_after_s > 0)
    return True


@given(
    rate=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=200),
)
def test_no_client_gets_more_than_its_rate_and_one_burst(rate, gaps):
    quota, now, count = Quota(rate=rate, in_flight=0), 0.0, 0
    for gap in gaps:
        now += gap
        count += entered(quota, "greedy", now)
    assert count <= rate + rate * now + 1e-6
    assert entered(quota, "other", now)


def test_who_waits_as_told_is_let_in():
    quota = Quota(rate=4, in_flight=0)
    assert sum(entered(quota, "c", 0.0) for _ in range(10)) == 4
    with pytest.raises(Problem) as found:
        quota.enter("c", 0.0)
    quota.enter("c", found.value.retry_after_s)


@pytest.mark.parametrize("rate", [1e-9, 5e-324])
def test_who_would_wait_for_years_is_told_so_in_days(rate):
    quota = Quota(rate=rate, in_flight=0)
    quota.enter("c", 0.0)
    with pytest.raises(Problem) as found:
        quota.enter("c", 0.0)
    assert found.value.all_headers() == [("retry-after", "86400")]


def test_requests_in_flight_are_counted_by_client():
    quota = Quota(rate=0, in_flight=2)
    assert [entered(quota, "c", 0.0) for _ in range(3)] == [True, True, False]
    assert entered(quota, "d", 0.0)
    quota.leave("c")
    assert entered(quota, "c", 0.0)


def test_clients_that_are_gone_are_forgotten_and_those_served_are_not():
    quota = Quota(rate=1, in_flight=1)
    quota.enter("served", 0.0)
    for number in range(5000):
        quota.enter(f"c{number}", 0.0)
        quota.leave(f"c{number}")
    assert len(quota._shares) <= 4097
    assert not entered(quota, "served", 9.0)


def test_a_server_refuses_a_client_beyond_its_share_with_429():
    with running("--no-auth", "--client-rate", 3, "--client-in-flight", 1) as server:
        statuses = [server.predict().status_code for _ in range(8)]
        assert statuses[:3] == [200] * 3
        assert statuses.count(429) >= 3
        refused = next(a for a in iter(server.predict, None) if a.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert server.count("forge_requests_shed_total", reason="quota") >= 4
        assert server.client.get("/healthz").status_code == 200


class Steps:
    """An engine of which only the queue and the speed are asked: 10 ms for each unit of work."""

    def __init__(self):
        self.inbox, self.ahead = [], 0

    def wait_s(self, cost, steps):
        return 0.010 * (self.ahead + cost)

    def starts_over(self, now):
        return False


def admission_of(engine, state=State.READY):
    health = Health()
    health.become(state)
    return Admission(Settings(max_queue=4), health, engine, Metrics())


def refusal(call):
    with pytest.raises(Problem) as found:
        call()
    return found.value.kind, found.value.reason


def test_a_body_is_read_only_when_something_could_be_done_for_the_smaller_requests():
    async def run():
        engine = Steps()
        admission = admission_of(engine)
        now = time.monotonic()

        def enter(cost):
            admission.enter("c", cost=cost, steps=1, deadline=now + 1.0, now=now)

        for _ in range(50):
            enter(20)
        engine.ahead = 50
        admission.check_open(now + 1.0)  # not overloaded: nothing is known of what it asks for
        assert refusal(lambda: enter(20)) == (OVERLOADED, "wait")
        assert admission.is_overloaded
        assert refusal(lambda: admission.check_open(now + 1.0)) == (OVERLOADED, "wait")
        engine.ahead = 0
        admission.check_open(now + 1.0)
        enter(1)  # one small request, and room for it is enough
        engine.ahead = 50
        admission.check_open(now + 1.0)
        engine.inbox = [0] * 4
        assert refusal(lambda: admission.check_open(now + 1.0)) == (OVERLOADED, "queue")

    asyncio.run(run())


def test_nothing_is_read_while_the_server_is_not_ready():
    admission = admission_of(Steps(), State.DRAINING)
    assert refusal(lambda: admission.check_open(time.monotonic() + 1))[0] is NOT_READY


def test_one_slow_step_does_not_have_an_idle_server_refuse_everything_for_ever():
    with running("--first-s", 0.8, "--deadline-s", 1, script=FAULTY) as server:
        server.predict()
        assert wait_for(lambda: server.predict().status_code == 200, 10)
        assert server.predict().status_code == 200
