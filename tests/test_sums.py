"""Sums are those of every Python."""

from hypothesis import given
from hypothesis import strategies as st

from forge_harness.sums import sum_in_order


def test_roundoff_is_not_carried_along():
    """As Python 3.12 and later do it is 1.0."""
    assert sum_in_order([0.1] * 10) == 0.9999999999999999


def test_of_nothing_it_is_a_float():
    assert sum_in_order([]).hex() == "0x0.0p+0"


@given(st.lists(st.floats(0, 1e6)))
def test_each_addition_is_rounded(values):
    total = 0.0
    for value in values:
        total = total + value
    assert sum_in_order(iter(values)) == total
