import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.serving.estimate import StepTime


def taught(steps, capacity=10):
    known = StepTime(capacity)
    for work, seconds in steps:
        known.observe(work, seconds)
    return known


def test_a_line_is_found_and_predicts_a_full_queue():
    known = taught([(n % 9 + 1, 0.010 + 0.001 * (n % 9 + 1)) for n in range(200)])
    # 95 ahead and 5: ten full steps.
    assert known.wait_s(95, 5, 1) == pytest.approx(10 * 0.010 + 100 * 0.001, rel=1e-6)
    # A text of 40 tokens takes 40 steps, however empty the server is.
    assert known.wait_s(0, 40, 40) == pytest.approx(40 * 0.010 + 40 * 0.001, rel=1e-6)


def test_an_idle_server_is_not_taken_for_a_slow_one():
    known = taught([(1, 0.1)] * 50)
    assert known.wait_s(9, 1, 1) == pytest.approx(0.1)


def test_a_moment_of_speed_does_not_shorten_the_wait_and_a_slow_one_lengthens_it():
    slow, fast = [(4, 0.010)] * 300, [(4, 0.005)] * 20
    assert taught(slow + fast).wait_s(0, 1, 1) > 0.0085
    assert taught(fast * 15 + slow[:20]).wait_s(0, 1, 1) > 0.009
    # Lasting, it counts.
    assert taught(slow + fast * 30).wait_s(0, 1, 1) == pytest.approx(0.005, rel=0.05)


def test_nothing_is_refused_before_the_first_step():
    assert StepTime(4).wait_s(1000, 1, 1) == 0.0


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 10)), min_size=1))
def test_a_wait_is_finite_and_grows_with_what_is_ahead(steps):
    known = taught(steps, capacity=64)
    waits = [known.wait_s(ahead, 1, 1) for ahead in range(0, 300, 10)]
    assert all(0 <= wait < 1e9 for wait in waits)
    assert waits == sorted(waits)
