import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.serving.admission import Quota
from forge_harness.serving.problems import QUOTA, Problem

from .support import running


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
